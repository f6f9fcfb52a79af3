"""Find the boxes of a global tensor that this rank holds, and the memory of their data.

A box is (offsets, sizes), with one number for each dimension. A plain tensor is one box. The boxes
of a DTensor follow from its mesh and placements. A ShardedTensor lists its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from shardckpt.errors import PartialPlacementError, StateError, UnsupportedLeafError
from shardckpt.format.dtypes import OPAQUE, memory_dtype, memory_view
from shardckpt.format.entries import Box
from shardckpt.format.manifest import MOST_DIMS
from shardckpt.io.tensor_memory import check_memory, owns_memory, plain_address
from shardckpt.state.sharded_array import ShardedArray
from shardckpt.torch_compat import (
    distribute_locally,
    division_order,
    dtensor_class,
    dtensor_local,
    is_dtensor,
    spec_of,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "PLAIN",
    "AnyTensor",
    "LocalChunk",
    "Shards",
    "addressed_chunk",
    "box_slices",
    "check_dense",
    "has_file_layout",
    "is_distributed",
    "is_sharded_tensor",
    "local_chunks",
    "local_layout",
    "local_tensor",
    "may_have_replicas",
    "plain_data",
    "shared_box",
]

PLAIN = (torch.Tensor, torch.nn.Parameter)
_ORIGINS = [(0,) * dims for dims in range(MOST_DIMS + 1)]
_REMEMBERED = 65_536  # layouts of DTensors


class LocalChunk(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A box of a global tensor, and the local tensor that holds its data.

    Attributes:
        offsets: The offsets of the box.
        sizes: The sizes of the box, which are the shape of `data`.
        data: The local tensor.
        address: The address of the data, if it is known to lie as saved (`has_file_layout`).
            Otherwise 0.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    data: torch.Tensor
    address: int = 0


@dataclass(eq=False, slots=True)
class Shards:
    """The boxes of a global tensor that this rank holds, as the tensor `source` describes them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[LocalChunk]
    source: torch.Tensor

    @property
    def is_meta(self) -> bool:
        """Whether a box is on the meta device."""
        return any(chunk.data.is_meta for chunk in self.chunks)


AnyTensor = torch.Tensor | ShardedArray | Shards
"""The types of the tensors in a flattened state."""


def box_slices(outer: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Any:
    """Return the index that cuts the box (offsets, sizes) out of a tensor that begins at
    `outer`.
    """
    return tuple(
        slice(offset - start, offset - start + size)
        for start, offset, size in zip(outer, offsets, sizes, strict=True)
    )


def shared_box(
    offsets: Sequence[int],
    sizes: Sequence[int],
    other_offsets: Sequence[int],
    other_sizes: Sequence[int],
) -> Box | None:
    """Return the offsets and sizes of the box that two boxes share. None if it is empty."""
    begin = tuple(map(max, offsets, other_offsets))
    ends = zip(offsets, sizes, other_offsets, other_sizes, strict=True)
    shared = tuple(
        min(at + n, other + m) - low for (at, n, other, m), low in zip(ends, begin, strict=True)
    )
    return (begin, shared) if all(size > 0 for size in shared) else None


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor or a ShardedTensor."""
    return type(tensor) is not torch.Tensor and (is_dtensor(tensor) or is_sharded_tensor(tensor))


def may_have_replicas(tensor: AnyTensor, *, world_size: int) -> bool:
    """Whether other ranks may hold the same box.

    False for a ShardedArray, and for a DTensor whose mesh has all ranks and that is sharded along
    every dimension of the mesh. A smaller mesh may have siblings with the same boxes.
    """
    if type(tensor) in PLAIN:
        return True
    if isinstance(tensor, ShardedArray):
        return False
    if not is_dtensor(tensor):
        return True
    layout = _layout_of(tensor)
    return layout.mesh_size < world_size or layout.replicated


def local_tensor(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the dense tensor in the memory of this rank: a plain tensor or the local part of a
    DTensor.

    Returns None for all other tensors. Free inside torch.no_grad().
    """
    if type(tensor) in PLAIN:
        return tensor if tensor.layout is torch.strided else None
    if is_dtensor(tensor):
        local: Any = tensor.to_local()
        if hasattr(local, "wait"):  # an unfinished AsyncCollectiveTensor
            local = local.wait()
        return local if local.layout is torch.strided else None
    if is_distributed(tensor) or hasattr(tensor, "__tensor_flatten__"):
        return None
    return tensor if tensor.layout is torch.strided else None


def plain_data(tensor: Any) -> torch.Tensor | None:
    """Return the dense data of this rank, without a wait: a plain tensor, or the local part of a
    DTensor if that is a plain tensor.

    Returns None for all other tensors.
    """
    cls = type(tensor)
    if cls in PLAIN:
        return None if hasattr(tensor, "global_shape") else tensor
    if cls is dtensor_class():
        local = dtensor_local(tensor)
        return local if type(local) is torch.Tensor else None
    return None


def addressed_chunk(tensor: torch.Tensor, shape: tuple[int, ...]) -> LocalChunk | None:
    """Return the box of a tensor of this shape whose elements on this rank are one contiguous run
    of CPU memory, with its address, as most tensors are.

    Returns None for all other tensors, for which local_chunks has checks and errors.
    """
    data = plain_data(tensor)
    if data is None or not (address := plain_address(data)) or tensor.shape != shape:
        return None
    if data is tensor:  # a chunk for each of many tensors shares its tuples with others
        return LocalChunk(_ORIGINS[len(shape)], shape, tensor, address)
    boxes = _layout_of(tensor).boxes  # type: ignore[arg-type]
    if boxes is None or len(boxes) != 1 or boxes[0][1] != data.shape:
        return None
    return LocalChunk(*boxes[0], data, address)


def local_chunks(tensor: AnyTensor, *, name: str) -> list[LocalChunk]:
    """Return the boxes of `tensor` that this rank holds. Not collective.

    Boxes without elements are left out, but a global tensor without elements is one empty box. The
    list is empty if the tensor's mesh does not include this rank.

    Raises:
        PartialPlacementError: The tensor is a DTensor of partial sums.
        StateError: The local part of a DTensor does not have the size of its box.
    """
    chunks = _chunks(tensor, name=name)
    if tensor.dtype in OPAQUE:
        return [LocalChunk(c.offsets, c.sizes, memory_view(c.data)) for c in chunks]
    return chunks


def _chunks(tensor: AnyTensor, *, name: str) -> list[LocalChunk]:
    if type(tensor) in PLAIN:
        shape = tuple(tensor.shape)
        return [LocalChunk((0,) * len(shape), shape, tensor)]  # type: ignore[arg-type]
    if isinstance(tensor, Shards):
        return tensor.chunks
    if isinstance(tensor, ShardedArray):
        local = tensor.tensor
        chunks = [LocalChunk(tensor.offsets, tuple(local.shape), local)]
    elif is_dtensor(tensor):
        chunks = _dtensor_chunks(tensor, name=name)
    else:
        # detach() turns a DiskTensor into a plain tensor.
        chunks = [LocalChunk((0,) * tensor.dim(), tuple(tensor.shape), tensor.detach())]
    if 0 in tensor.shape:
        return chunks
    return [chunk for chunk in chunks if 0 not in chunk.sizes]


def has_file_layout(data: torch.Tensor, dtype: str) -> bool:
    """Whether the elements are in CPU memory in the layout of a file: row-major, with the same
    dtype.
    """
    return (
        data.layout is torch.strided
        and not data.is_nested
        and data.is_cpu
        and data.dtype == memory_dtype(dtype)
        and data.is_contiguous()
        and not data.is_neg()
        and not data.is_conj()
    )


def is_sharded_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is torch's ShardedTensor."""
    # The class is not imported, as it is in a private package.
    return type(tensor).__name__ == "ShardedTensor" and hasattr(tensor, "local_shards")


def check_dense(tensor: AnyTensor, *, name: str) -> None:
    """Raise UnsupportedLeafError, which names the tensor, if its memory does not hold its elements.

    This is the case for sparse, quantized, nested, uninitialized and freed tensors, and for
    subclasses that wrap other tensors.
    """
    if isinstance(tensor, ShardedArray):
        tensor = tensor.tensor
    cls = type(tensor)
    if isinstance(tensor, Shards):
        for chunk in tensor.chunks:
            check_dense(chunk.data, name=name)
        return
    if cls in PLAIN:
        if tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested):
            if not tensor.is_meta:
                check_memory(tensor, name=name)
            return
        also = ", quantized" if tensor.is_quantized else ", nested" if tensor.is_nested else ""
        actual, remedy = f"{tensor.layout}{also}", "convert it first: to_dense(), dequantize() ..."
    elif isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        actual, remedy = "a lazy parameter", "run the module once, which sets its shape"
    elif is_dtensor(tensor):
        local: Any = dtensor_local(tensor)
        if not hasattr(local, "wait"):  # otherwise its memory exists when the collective is done
            check_dense(local, name=name)
        return
    elif tensor.is_meta or _has_data(tensor):
        return
    else:
        actual = f"{cls.__module__}.{cls.__qualname__}, which wraps other tensors or has no memory"
        remedy = "save the tensors that it wraps, or convert it to a plain tensor first"
    raise UnsupportedLeafError(
        "A tensor of this type can't be saved or loaded",
        tensor=name,
        expected="a dense tensor, DTensor or ShardedTensor",
        actual=actual,
        remedy=remedy,
    )


def _has_data(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a subclass has its own memory, or detach() makes a plain tensor of it.

    Subclasses that wrap other tensors define `__tensor_flatten__` (semi-public).
    """
    if hasattr(tensor, "__tensor_flatten__"):
        return False
    if owns_memory(tensor):
        return True
    try:
        plain = tensor.detach()
    except Exception:  # raised by the code of the subclass
        return False
    return type(plain) in PLAIN and owns_memory(plain)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The facts that follow from the spec of a DTensor. `depends_on` holds the parts of the
    spec.
    """

    depends_on: tuple[Any, Any, Any]
    mesh_size: int
    replicated: bool
    partial: bool
    boxes: list[Box] | None  # None if the mesh does not include this rank


_layouts: dict[int, _Layout] = {}


def _layout_of(tensor: DTensor) -> _Layout:
    """Return the layout of a DTensor, cached by the identity of its spec.

    The cache avoids slow attributes of DTensor. The spec exists as long as the parameter or
    optimizer state.
    """
    spec: Any = spec_of(tensor)
    layout = _layouts.get(id(spec))
    if layout is not None:
        same_spec, placements, meta = layout.depends_on
        if same_spec is spec and placements is spec.placements and meta is spec.tensor_meta:
            return layout
    mesh, placements = tensor.device_mesh, tensor.placements
    partial = any(placement.is_partial() for placement in placements)
    coordinate = mesh.get_coordinate()
    layout = _Layout(
        depends_on=(spec, placements, spec.tensor_meta),
        mesh_size=mesh.size(),
        replicated=any(
            placement.is_replicate() and size > 1  # isinstance costs 0.1 ms
            for placement, size in zip(placements, mesh.shape, strict=True)
        ),
        partial=partial,
        boxes=None
        if partial or coordinate is None
        else _boxes(tuple(tensor.shape), mesh, tuple(coordinate), placements, division_order(spec)),
    )
    if len(_layouts) >= _REMEMBERED:
        _layouts.clear()
    _layouts[id(spec)] = layout
    return layout


def local_layout(tensor: DTensor) -> list[Box]:
    """Return the boxes of a DTensor that this rank holds, empty if its mesh does not include this
    rank.
    """
    return _layout_of(tensor).boxes or []


def _dtensor_chunks(tensor: DTensor, *, name: str) -> list[LocalChunk]:
    layout = _layout_of(tensor)
    if layout.partial:
        raise PartialPlacementError(
            "A DTensor with a Partial placement holds unreduced sums",
            tensor=name,
            expected="Shard or Replicate placements",
            actual=str(tensor.placements),
            remedy="redistribute() it to Replicate() or Shard() before saving",
        )
    if layout.boxes is None:
        return []
    local: Any = dtensor_local(tensor)
    if type(local) is not torch.Tensor:
        with torch.no_grad():
            local = local_tensor(tensor)
    assert local is not None, "a DTensor is dense"
    boxes = layout.boxes
    held = sum(math.prod(sizes) for _, sizes in boxes)
    if local.numel() != held or (len(boxes) == 1 and local.shape != boxes[0][1]):
        raise StateError(
            "The local part of a DTensor does not have the size that its placements give it",
            tensor=name,
            expected=" and ".join(str(list(sizes)) for _, sizes in boxes),
            actual=f"{list(local.shape)}, of {list(tensor.shape)} with {tensor.placements}",
            remedy="divide the tensor as distribute_tensor does: DTensor.from_local does not check "
            "the sizes of local tensors",
        )
    if len(boxes) == 1:
        (offsets, sizes) = boxes[0]
        return [LocalChunk(offsets, sizes, local)]
    return [
        LocalChunk(offsets, sizes, local[cut])
        for (offsets, sizes), cut in zip(boxes, _local_cuts(boxes), strict=True)
    ]


@lru_cache(maxsize=65_536)
def _boxes(
    shape: tuple[int, ...],
    mesh: Any,
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
    order: tuple[int, ...],
) -> list[Box]:
    """Return the boxes of a DTensor on this rank, in row-major order of the local tensor.

    There is one box, except for strided shards: if a dimension is sharded by one mesh dimension
    inside another, there is one box for each run of neighbouring indices. `coordinate` is that of
    this rank in the mesh: meshes of different ranks are equal, and a process may return as another
    rank. The mesh dimensions divide the tensor in `order`.
    """
    if all(placement.is_replicate() for placement in placements):
        return [((0,) * len(shape), shape)]
    runs = [
        _runs(size, mesh, coordinate, _along(placements, dim), order)
        for dim, size in enumerate(shape)
    ]
    return [
        (tuple(start for start, _ in box), tuple(length for _, length in box))
        for box in itertools.product(*runs)
    ]


def _along(placements: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    """Return the placements of a 1-D tensor that is sharded like dimension `dim` of a tensor."""
    from torch.distributed.tensor import Replicate, Shard

    along: list[Any] = []
    for placement in placements:
        if getattr(placement, "dim", None) != dim:
            along.append(Replicate())
        elif not hasattr(placement, "split_factor"):
            along.append(Shard(0))
        else:  # _StridedShard, private in torch: FSDP2 over tensor parallel
            along.append(type(placement)(0, split_factor=placement.split_factor))
    return tuple(along)


@lru_cache(maxsize=4_096)
def _runs(
    size: int,
    mesh: Any,
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
    order: tuple[int, ...],
) -> list[tuple[int, int]]:
    """Return (start, length) of the runs of indices of a dimension that this rank holds.

    Plain shards are divided by the rule of torch.chunk, for each mesh dimension in `order`. For
    strided shards, DTensor shards a tensor of indices, without communication.
    """
    if not any(hasattr(placement, "split_factor") for placement in placements):
        start, length = 0, size
        for at in order:
            if placements[at].is_shard():
                step = -(-length // mesh.shape[at])
                begin = min(coordinate[at] * step, length)
                start, length = start + begin, min(step, length - begin)
        return [(start, length)]
    indices = distribute_locally(
        torch.arange(size, device=mesh.device_type), mesh, placements
    ).to_local()
    if indices.numel() == 0:
        return [(0, 0)]
    cuts = (torch.diff(indices) != 1).nonzero().flatten() + 1
    return [(int(run[0]), run.numel()) for run in torch.tensor_split(indices.cpu(), cuts.cpu())]


def _local_cuts(boxes: list[Box]) -> list[Any]:
    """Return the index of each box in the local tensor, in which the runs follow each other."""
    begins: list[dict[int, int]] = []
    for dim in range(len(boxes[0][0])):
        runs = dict.fromkeys((offsets[dim], sizes[dim]) for offsets, sizes in boxes)
        lengths = itertools.accumulate((length for _, length in runs), initial=0)
        begins.append({start: begin for (start, _), begin in zip(runs, lengths, strict=False)})
    return [
        tuple(
            slice(begins[dim][offset], begins[dim][offset] + size)
            for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
        )
        for offsets, sizes in boxes
    ]
