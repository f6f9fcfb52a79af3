"""Read torch files that hold DTensors: the local tensors of a rank, and how the ranks divide them.

torch.load would make DTensors, which need the process groups of the job that saved them. Here the
pickle is read with stand-ins for all names in it; see pickle_scan. Tensors are read from the file
when they are used. For the files of torch 2.6 to 2.14.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from shardckpt.convert.dtensor_layout import LocalBox, Placement, Sharding
from shardckpt.convert.foreign_file import mapped, utf8_path
from shardckpt.convert.pickle_scan import Named
from shardckpt.convert.refusals import is_harmful, malicious
from shardckpt.convert.torch_objects import stand_in
from shardckpt.convert.torch_reader import StorageRecord, StorageStandIn, read_structure

__all__ = ["LocalTensor", "Structure", "read_local_state"]

_MOST_RANKS, _MOST_DIMS = 1 << 20, 64
_TENSOR = "torch._utils._rebuild_tensor"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_WITH_TYPE, _WRAPPER = (
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_wrapper_subclass",
)
_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip


@dataclass(slots=True, eq=False)
class LocalTensor:
    """A tensor in the file of one rank.

    Attributes:
        dtype: Its dtype.
        shape: Its local shape.
        read: Reads a box of it: offsets and sizes, in elements.
        identity: Equal for tied tensors of the file.
        checksum: Equal for equal tensors of two files, or None if it is not known.
        sharding: The sharding of a DTensor. None for a plain tensor.
        boxes: The global shape and the boxes of the rank, where they are known without a sharding.
        absent: Whether it is a DTensor whose mesh does not include the rank.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[tuple[int, ...], tuple[int, ...]], torch.Tensor]
    identity: object = None
    checksum: object = None
    sharding: Sharding | None = None
    boxes: tuple[tuple[int, ...], list[LocalBox]] | None = None
    absent: bool = False


class _View(NamedTuple):
    """A tensor as a view of a storage in the bytes of a file, uint8 [n]. `begin` is the first byte
    of the storage; `offset` and `stride` are in elements after it."""

    file: torch.Tensor
    begin: int
    dtype: torch.dtype
    offset: int
    stride: tuple[int, ...]
    conj: bool
    neg: bool

    def read(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """See LocalTensor.read."""
        if 0 in sizes:
            return torch.empty(sizes, dtype=self.dtype, device="cpu")
        item = self.dtype.itemsize
        first = self.offset + sum(o * s for o, s in zip(offsets, self.stride, strict=True))
        span = 1 + sum((n - 1) * s for n, s in zip(sizes, self.stride, strict=True))
        begin = self.begin + first * item
        raw = self.file[begin : begin + span * item].clone()
        flat = raw.view(self.dtype)
        found = flat.as_strided(sizes, self.stride)
        if found.is_contiguous():
            found = flat.reshape(sizes)  # strides of dimensions of size 1 may be any
        if self.conj:
            found = found.conj().resolve_conj()
        return -found if self.neg else found


class Structure(NamedTuple):
    """The state in a file: dicts, lists and values, with LocalTensors and StandIns for tensors and
    objects. `containers`: id of a dict or list -> (it, the class that the file names)."""

    root: Any
    containers: dict[int, tuple[Any, str]]


def read_local_state(path: str, *, rank: int) -> Structure:
    """Read the state of one rank in a torch file.

    Raises:
        CorruptionError, NotACheckpointError: The file is not a torch file, or corrupted.
        ValueError, TypeError, KeyError, IndexError, AttributeError: The description of a DTensor is
            invalid, or is that of another rank.
    """
    with mapped(path) as data:
        root, records = read_structure(data, path)
        size_bytes = len(data)
    with utf8_path(path) as name:
        file = torch.from_file(name, shared=False, size=size_bytes, dtype=torch.uint8)
    reader = _Reader(path, file, records, rank)
    return Structure(reader.plain(root), reader.containers)


class _Reader:
    """Replaces the stand-ins of pickle_scan by values."""

    def __init__(
        self, path: str, file: torch.Tensor, records: dict[str, StorageRecord], rank: int
    ) -> None:
        self.path, self.file, self.records, self.rank = path, file, records, rank
        self.containers: dict[int, tuple[Any, str]] = {}
        self.shardings: dict[int, Sharding | None] = {}
        self.meshes: dict[int, Mesh | None] = {}

    def plain(self, node: Any) -> Any:
        """Return the value for which a node of the pickle stands."""
        if isinstance(node, Named):
            return self._made(node)
        if isinstance(node, type) and issubclass(node, Named):
            return type(stand_in(node.name))
        if type(node) in (dict, OrderedDict):
            return type(node)((self.plain(key), self.plain(item)) for key, item in node.items())
        if type(node) in (list, tuple, set):
            return type(node)(map(self.plain, node))
        return (
            stand_in("torch.storage.UntypedStorage") if isinstance(node, StorageStandIn) else node
        )

    def _made(self, node: Named) -> Any:
        name, args = node.name, node.args
        if is_harmful(name):
            raise malicious(self.path, name)
        if name.startswith(_TENSOR) and name.removeprefix(_TENSOR) in ("", "_v2", "_v3"):
            return self._tensor(node)
        if name in _PARAMETERS:
            return self.plain(args[0])
        if name == _WITH_TYPE:
            return self._with_type(node)
        if name == "_codecs.encode":
            return args[0].encode(args[1])
        if name == "builtins.bytearray":
            return bytearray(*map(self.plain, args))
        if name == "builtins.complex":
            return complex(*args)
        if name == "builtins.frozenset":
            return frozenset(*map(self.plain, args))
        if name == "collections.Counter" and not node.items:
            return Counter(*map(self.plain, args))
        if node.items:
            return self._container(node)
        if _is_class(node, "torch.distributed.", "DeviceMesh"):  # its state refers back to it
            return stand_in(name)
        return stand_in(name, [*map(self.plain, args)], self.plain(node.state))

    def _container(self, node: Named) -> Any:
        """Return the dict or list with the items of an object of a subclass."""
        items = [self.plain(item) for item in node.items]
        pairs = zip(items[::2], items[1::2], strict=True)
        found: Any = OrderedDict(pairs) if node.is_mapping else items
        self.containers[id(found)] = found, node.name
        return found

    def _tensor(self, node: Named) -> LocalTensor:
        storage, offset, size, stride = node.args[:4]
        rest = node.args[4:]
        if node.name.endswith("_v3"):
            dtype = rest[2]
        else:
            type_name = storage.type_name.removeprefix("torch.").removesuffix("Storage")
            dtype = _DTYPES[type_name]
        bits: Any = rest[-1] if rest and type(rest[-1]) is dict else {}
        record = self.records[storage.key]
        view = _View(
            file=self.file,
            begin=record.begin,
            dtype=dtype,
            offset=offset,
            stride=tuple(stride),
            conj=bool(bits.get("conj")),
            neg=bool(bits.get("neg")),
        )
        facts = (tuple(size), *view[2:])
        return LocalTensor(
            dtype,
            tuple(size),
            view.read,
            identity=(view.begin, *facts),
            checksum=(record.crc, record.size_bytes, *facts) if record.crc else None,
        )

    def _with_type(self, node: Named) -> Any:
        """Return a DTensor, or an object of a subclass of Tensor without its type."""
        function, tensor_type, args, state = node.args
        if function.name == _WRAPPER:
            if not _is_class(tensor_type, "torch.distributed.", "DTensor"):
                return stand_in(tensor_type.name)
            facts = next(part for part in state if isinstance(part, dict) and "_spec" in part)
            local = self.plain(facts["_local_tensor"])
            if not isinstance(local, LocalTensor):
                return stand_in(f"DTensor of {getattr(local, 'name', type(local).__name__)}")
            spec = facts["_spec"]
            if id(spec) not in self.shardings:
                self.shardings[id(spec)] = self._sharding(spec.state)
            local.sharding = self.shardings[id(spec)]
            local.absent = local.sharding is None
            return local
        inner: Any = function()
        inner.args, inner.state = args, None
        return self.plain(inner)

    def _sharding(self, facts: Any) -> Sharding | None:
        """Return the sharding in the state of a DTensorSpec. None if the mesh lacks the rank."""
        node = facts["mesh"]
        if id(node) not in self.meshes:
            found = _mesh(node.state, self.plain, self.rank)
            self.meshes[id(node)] = None if found is None else _interned(found)
        mesh = self.meshes[id(node)]
        if mesh is None:
            return None
        placements = tuple(map(_placement, facts["placements"]))
        order = list(range(len(placements)))
        if facts.get("shard_order") and not any(p.split_factor for p in placements):
            first = [dim for entry in facts["shard_order"] for dim in entry.args[1]]
            order = first + [dim for dim in order if dim not in first]
        shape = tuple(facts["tensor_meta"].args[0])
        return Sharding(shape, *mesh, placements, tuple(order)).check()


@functools.lru_cache(maxsize=256)
def _interned(mesh: Mesh) -> Mesh:
    """Return one object for equal meshes, as each rank describes the same ones."""
    return mesh


def _is_class(node: Any, package: str, name: str) -> bool:
    full = getattr(node, "name", "")
    return bool(full.startswith(package) and full.rpartition(".")[2] == name)


def _placement(node: Named) -> Placement:
    facts, name = node.state or {}, node.name.rpartition(".")[2]
    if name == "Replicate":
        return Placement()
    if name in ("Shard", "_StridedShard"):
        return Placement(facts["dim"], facts.get("split_factor", 0))
    return Placement(reduction=str(facts.get("reduce_op", name)))


Mesh = tuple[tuple[int, ...], tuple[int, ...]]
"""The sizes of a mesh, and its ranks in row-major order."""


def _mesh(facts: Any, plain: Callable[[Any], Any], rank: int) -> Mesh | None:
    """Return the mesh in the state of a DeviceMesh. None if it lacks the rank of the file.

    Before torch 2.9, the state has the mesh as a tensor. Then it has all ranks of the root mesh,
    and a layout that selects those of this mesh and of its siblings.
    """
    coordinate = facts["_coordinate_on_dim"]
    own = facts.get("_rank", rank)
    if coordinate is None or own != rank:
        if own != rank:
            raise ValueError(f"a mesh of rank {own} in the file of rank {rank}")
        return None
    saved = facts.get("mesh", facts.get("_mesh"))
    if saved is not None:
        ranks, sizes = _numbers(plain(saved))
    else:
        known, _ = _numbers(plain(facts["_rank_map"]))
        described = list(_axes(facts["_layout"].state))
        parts = [size for axis, _ in described for size in axis]
        if len(parts) > _MOST_DIMS or min(parts, default=1) < 1 or math.prod(parts) > _MOST_RANKS:
            raise ValueError("a mesh of too many ranks")
        axes = [_axis_offsets(*axis) for axis in described]
        sizes = tuple(map(len, axes))
        base = known.index(rank) - sum(axis[at] for axis, at in zip(axes, coordinate, strict=True))
        places = [base + sum(offsets) for offsets in itertools.product(*axes)]
        if min(places) < 0:
            raise ValueError("a mesh whose ranks are not in its root mesh")
        ranks = tuple(known[place] for place in places)
    at = ranks.index(rank)
    for size, index in zip(reversed(sizes), reversed(coordinate), strict=True):
        if at % size != index:
            raise ValueError(f"rank {rank} has the place of another rank in the mesh")
        at //= size
    return sizes, ranks


def _numbers(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the elements of a tensor of integers, and its shape."""
    if not isinstance(tensor, LocalTensor) or tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError("a mesh that is not a tensor of integers")
    if math.prod(tensor.shape) > _MOST_RANKS:
        raise ValueError("a mesh of too many ranks")
    found = tensor.read((0,) * len(tensor.shape), tensor.shape)
    return tuple(found.reshape(-1).tolist()), tensor.shape


def _axes(facts: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the sizes and strides of each dimension of a layout."""
    if "axes" in facts:  # torch 2.14
        parts = [(axis.state["shape"], axis.state["stride"]) for axis in facts["axes"]]
    else:
        shape, stride = (
            node if type(node) is tuple else (node,) for node in (facts["shape"], facts["stride"])
        )
        parts = list(zip(shape, stride, strict=True))
    for shape, stride in parts:
        yield list(_flat(shape)), list(_flat(stride))


def _flat(node: Any) -> Iterator[int]:
    if type(node) is tuple:
        for item in node:
            yield from _flat(item)
    else:
        yield node


def _axis_offsets(sizes: list[int], strides: list[int]) -> list[int]:
    steps = [
        [index * stride for index in range(size)]
        for size, stride in zip(sizes, strides, strict=True)
    ]
    return [sum(parts) for parts in itertools.product(*steps)]
