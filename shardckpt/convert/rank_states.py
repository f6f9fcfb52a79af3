"""Merge the states that ranks saved in files of their own to one state: global tensors from the
parts of the ranks, and values.

An entry that is equal on all ranks that have it stays as it is. Values that differ become PerRank.
Plain tensors that differ become PerRank too, unless other tensors of the same item are equal on all
ranks or sharded, as in a model under DDP, whose buffers may differ: then the first rank's is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from shardckpt.convert.boxes import ReadBox
from shardckpt.convert.dtensor_layout import LocalBox
from shardckpt.convert.torch_objects import ObjectsLoader, StandIn, why
from shardckpt.convert.torch_structure import LocalTensor
from shardckpt.errors import CorruptionError, CoverageError, NotACheckpointError, ShardckptError
from shardckpt.format import typed_json as values
from shardckpt.format.tiling import find_gap
from shardckpt.io.buffers import BUFFER_BYTES
from shardckpt.maintenance.rewritable import cut_box
from shardckpt.state.local_chunks import box_slices, shared_box
from shardckpt.state.markers import PerRank
from shardckpt.state.saved_tree import below

__all__ = ["RankStates"]

_Nodes = list[tuple[int, Any]]
"""(rank, value) of each rank that has an entry."""
_REMEDY = "load another checkpoint"
_VERSION = "_optimizer_state_format_version"
_NAMES = {"params", "param_names"}
"""Options of a parameter group that list its parameters, which pipeline stages divide."""


class _Differs(NamedTuple):
    """An entry that differs by rank."""

    name: str
    nodes: _Nodes


class _Piece(NamedTuple):
    box: LocalBox
    local: LocalTensor


class RankStates:
    """Merges the states of ranks, item by item.

    Attributes:
        reads: The function that reads boxes of a tensor, by the id of its placeholder.
        left_out: Entries that are not in the merged state, with reasons.
        changed: Entries of another form, with descriptions.
    """

    def __init__(
        self, path: str, world_size: int, missing: Callable[[str, int], ShardckptError]
    ) -> None:
        self.path, self.world_size, self._missing = path, world_size, missing
        self.reads: dict[int, ReadBox] = {}
        self.left_out: dict[str, str] = {}
        self.changed: dict[str, str] = {}
        self._locals: dict[int, tuple[torch.Tensor, LocalTensor]] = {}
        self._tied: dict[object, torch.Tensor] = {}
        self._per_rank: list[tuple[str, dict[int, Any]]] = []
        self._shared = False  # whether the item has a tensor of several ranks

    def per_rank(self) -> list[dict[str, Any]]:
        """Return the values of each rank for the PerRank in the states merged so far, by name."""
        if not self._per_rank:
            return []
        return [
            {name: found.get(rank) for name, found in self._per_rank}
            for rank in range(self.world_size)
        ]

    def merged(self, item: str, states: Mapping[int, tuple[Any, ObjectsLoader]]) -> Any:
        """Merge the states of an item by rank, with LocalTensors for tensors. `item` is its name.

        Raises:
            CorruptionError: Ranks describe a tensor differently; or the error of `missing`.
            CoverageError: The parts of a tensor overlap, or don't cover it.
        """
        nodes: _Nodes = []
        for rank, (state, objects) in states.items():
            found = objects.plain(self._placed(state), item)
            if isinstance(found, StandIn):
                objects.left_out[item] = why(found)
            else:
                nodes.append((rank, found))
            self.left_out = objects.left_out | self.left_out
            self.changed = objects.changed | self.changed
        self._shared, self._tied = False, {}
        return self._settled(self._merge(nodes, item), item) if nodes else {}

    def _placed(self, node: Any) -> Any:
        """Replace LocalTensors by placeholders."""
        if isinstance(node, LocalTensor):
            placeholder = torch.empty((), dtype=node.dtype, device="cpu").expand(node.shape)
            self._locals[id(placeholder)] = placeholder, node
            return placeholder
        if isinstance(node, dict):
            for key, item in node.items():
                node[key] = self._placed(item)
        elif type(node) is list:
            node[:] = map(self._placed, node)
        elif type(node) is tuple:
            return tuple(map(self._placed, node))
        return node

    def _merge(self, nodes: _Nodes, name: str) -> Any:
        first = nodes[0][1]
        if all(id(node) in self._locals for _, node in nodes):
            return self._tensor([(r, self._locals[id(node)][1]) for r, node in nodes], name)
        if len({type(node) for _, node in nodes}) > 1:
            return _Differs(name, nodes)
        if isinstance(first, dict):
            keys = dict.fromkeys(key for _, node in nodes for key in node)
            return {
                key: self._merge(
                    [(r, node[key]) for r, node in nodes if key in node], below(name, key)
                )
                for key in keys
            }
        if type(first) in (list, tuple):
            if len({len(node) for _, node in nodes}) == 1:
                items = [
                    self._merge([(r, node[index]) for r, node in nodes], below(name, index))
                    for index in range(len(first))
                ]
                return type(first)(items)
            if name.rpartition(".")[2] in _NAMES:
                return list(dict.fromkeys(item for _, node in nodes for item in node))
            return _Differs(name, nodes)
        texts = {_text(node, name) for _, node in nodes}
        return first if len(texts) == 1 else _Differs(name, nodes)

    # ---- tensors

    def _tensor(self, every: list[tuple[int, LocalTensor]], name: str) -> Any:
        locals_ = [(rank, local) for rank, local in every if not local.absent]
        if not locals_:
            self.left_out[name] = "a DTensor of other ranks, whose files are missing"
            return _Differs(name, [])
        divided = [local for _, local in locals_ if local.sharding or local.boxes]
        if len(divided) == len(locals_):
            self._shared = True
            return self._divided(locals_, name)
        if divided:
            raise self._disagree(name, "a DTensor on some ranks, and a plain tensor on others")
        rank, first = locals_[0]
        for _, other in locals_[1:]:
            if not _equal(first, other):
                return _Differs(name, [(r, self._whole(local)) for r, local in locals_])
        self._shared = self._shared or len(locals_) > 1
        return self._whole(first, key=(rank, first.identity))

    def _whole(self, local: LocalTensor, *, key: object = None) -> torch.Tensor:
        return self._placeholder(local.shape, local.dtype, local.read, key)

    def _placeholder(
        self, shape: tuple[int, ...], dtype: torch.dtype, read: ReadBox, key: object
    ) -> torch.Tensor:
        """Return a tensor without memory, whose data `read` reads. Tied tensors, which have equal
        keys, have one placeholder."""
        if key in self._tied:
            return self._tied[key]
        made = torch.empty((), dtype=dtype, device="cpu").expand(shape)
        self._locals[id(made)] = made, LocalTensor(dtype, shape, read)
        self.reads[id(made)] = read
        if key is not None:
            self._tied[key] = made
        return made

    def _divided(self, locals_: list[tuple[int, LocalTensor]], name: str) -> torch.Tensor:
        """Return the global tensor of which ranks hold parts."""
        first = locals_[0][1]
        shapes = {_global_shape(local) for _, local in locals_}
        if len(shapes) > 1 or len({local.dtype for _, local in locals_}) > 1:
            raise self._disagree(name, "other shapes or dtypes on each rank")
        shape = shapes.pop()
        ranks = {rank for rank, _ in locals_}
        meshes = {id(s.ranks): s.ranks for s in (local.sharding for _, local in locals_) if s}
        if lacking := set().union(*meshes.values()) - ranks:
            raise self._missing(name, min(lacking))
        sharding = first.sharding
        key = tuple((rank, local.identity, local.sharding) for rank, local in locals_)
        if sharding is not None and sharding.reduction:
            read = partial(self._refuse_partial, name, sharding.reduction)
            return self._placeholder(shape, first.dtype, read, key)
        pieces: dict[tuple[Any, Any], _Piece] = {}
        for rank, local, box in self._boxes(locals_, name):
            known = pieces.setdefault((box.offsets, box.sizes), _Piece(box, local)).local
            if None not in (known.checksum, local.checksum) and known.checksum != local.checksum:
                self.left_out[f"{name} of rank {rank}"] = "a replica with other bytes"
        self._check_coverage(list(pieces.values()), shape, name)
        read = partial(_read_pieces, list(pieces.values()), first.dtype)
        return self._placeholder(shape, first.dtype, read, key)

    def _boxes(
        self, locals_: list[tuple[int, LocalTensor]], name: str
    ) -> list[tuple[int, LocalTensor, LocalBox]]:
        """Return the boxes that the ranks hold of a tensor. The shapes of the local tensors show
        the order in which strided shards were made."""
        expected: tuple[int, ...] = ()
        for right_to_left in (False, True):
            found, wrong = [], None
            for rank, local in locals_:
                if local.sharding is None:
                    assert local.boxes is not None
                    boxes = local.boxes[1]
                    if not all(_inside(box, local.shape) for box in boxes):
                        raise self._disagree(name, "a box outside the tensor of its rank")
                else:
                    expected, boxes = local.sharding.local(rank, right_to_left=right_to_left)
                    if expected != local.shape and not 0 == math.prod(expected) == math.prod(
                        local.shape
                    ):
                        wrong = wrong or (rank, local.shape, expected)
                found += [(rank, local, box) for box in boxes if 0 not in box.sizes]
            if wrong is None:
                return found
        assert wrong is not None
        rank, actual, expected = wrong
        raise CorruptionError(
            "The local part of a DTensor does not have the shape that its placements give it",
            path=self.path,
            rank=rank,
            tensor=name,
            expected=str(list(expected)),
            actual=str(list(actual)),
            remedy=f"{_REMEDY}; or save this tensor divided as distribute_tensor does",
        )

    def _check_coverage(self, pieces: list[_Piece], shape: tuple[int, ...], name: str) -> None:
        rows = (len(pieces), len(shape))
        offsets = np.array([p.box.offsets for p in pieces], dtype=np.int64).reshape(rows)
        sizes = np.array([p.box.sizes for p in pieces], dtype=np.int64).reshape(rows)
        if (gap := find_gap(shape, offsets, sizes)) is not None:
            raise CoverageError(
                "The parts of the ranks don't cover a tensor exactly once",
                path=self.path,
                tensor=name,
                expected="every element in one part, or in replicas of it",
                actual=str(gap),
                remedy=_REMEDY,
            )

    def _refuse_partial(
        self, name: str, reduction: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Tensor:
        raise NotACheckpointError(
            "A DTensor with a Partial placement holds a part of each value on each rank",
            path=self.path,
            tensor=name,
            expected="Shard or Replicate placements",
            actual=f"Partial({reduction})",
            remedy="convert the other entries: choose them with keys; or redistribute() this one "
            "to Replicate() or Shard() before it is saved",
        )

    def _disagree(self, name: str, actual: str) -> CorruptionError:
        return CorruptionError(
            "The files of the ranks describe a tensor differently",
            path=self.path,
            tensor=name,
            expected="one dtype, shape and sharding",
            actual=actual,
            remedy=_REMEDY,
        )

    # ---- entries that differ

    def _settled(self, node: Any, name: str) -> Any:
        """Replace the entries that differ by PerRank, or by the tensor of the first rank."""
        if isinstance(node, _Differs):
            return self._settled_entry(node)
        if isinstance(node, dict):
            found = type(node)()
            for key, item in node.items():
                if not (isinstance(item, _Differs) and not item.nodes):
                    found[key] = self._settled(item, below(name, key))
            return self._optimizer(found, name) if _VERSION in found else found
        if type(node) in (list, tuple):
            items = [self._settled(item, below(name, index)) for index, item in enumerate(node)]
            return type(node)(items)
        return node

    def _settled_entry(self, entry: _Differs) -> Any:
        (_, first), *others = entry.nodes or [(0, None)]
        if isinstance(first, torch.Tensor) and self._shared:
            for rank, _ in others:
                self.left_out[f"{entry.name} of rank {rank}"] = "a tensor that differs by rank"
            return first
        nodes = {
            rank: self._own(node, f"{entry.name} of rank {rank}") for rank, node in entry.nodes
        }
        self._per_rank.append((entry.name, nodes))
        return PerRank(nodes.get(0))

    def _own(self, node: Any, name: str) -> Any:
        """Return a value of one rank. Raises CorruptionError for a part of a tensor in it."""
        if id(node) in self._locals:
            local = self._locals[id(node)][1]
            if local.absent or local.sharding or local.boxes:
                raise self._disagree(name, "a part of a tensor in a dict or list of another form")
            return self._whole(local)
        if isinstance(node, dict):
            return {key: self._own(item, below(name, key)) for key, item in node.items()}
        if type(node) in (list, tuple):
            items = [self._own(item, below(name, index)) for index, item in enumerate(node)]
            return type(node)(items)
        return node

    def _optimizer(self, node: dict[Any, Any], name: str) -> dict[Any, Any]:
        """Return the state of an optimizer, which torch_checkpointing saves by names, in the form
        in which shardckpt saves it."""
        groups = node.get("param_groups")
        if node[_VERSION] != 1 or type(groups) is not list:
            return node
        if not all(isinstance(g, dict) and type(g.get("param_names")) is list for g in groups):
            return node
        self.changed[name] = "an optimizer by names of parameters, as shardckpt saves it"
        kept = {key: item for key, item in node.items() if key != _VERSION}
        kept["param_groups"] = [{**g, "params": list(g["param_names"])} for g in groups]
        return kept


def _global_shape(local: LocalTensor) -> tuple[int, ...]:
    if local.sharding is not None:
        return local.sharding.shape
    assert local.boxes is not None
    return local.boxes[0]


def _inside(box: LocalBox, shape: Sequence[int]) -> bool:
    ends = zip(box.local_offsets, box.sizes, shape, strict=True)
    return all(begin >= 0 and size >= 0 and begin + size <= full for begin, size, full in ends)


def _text(value: Any, name: str) -> bytes:
    """Return text that is equal for equal values. 1, 1.0 and True differ."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.asarray(value)
        return repr((array.dtype.str, array.shape, array.tobytes())).encode()
    return msgspec.json.encode(values.encode(value, at=name), order="deterministic")


def _equal(one: LocalTensor, other: LocalTensor) -> bool:
    """Whether two tensors have equal bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.checksum is not None and one.checksum == other.checksum:
        return True
    if 0 in one.shape:
        return True
    most = BUFFER_BYTES // one.dtype.itemsize
    return all(
        torch.equal(_bytes(one.read(offsets, sizes)), _bytes(other.read(offsets, sizes)))
        for offsets, sizes in cut_box((0,) * len(one.shape), one.shape, most)
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _read_pieces(
    pieces: list[_Piece], dtype: torch.dtype, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> torch.Tensor:
    """Read a box of a tensor from the parts of the ranks."""
    result: torch.Tensor | None = None
    for (begin, held, local_begin), local in pieces:
        shared = shared_box(offsets, sizes, begin, held)
        if shared is None:
            continue
        low, inner = shared
        at = tuple(b + first - o for b, first, o in zip(local_begin, low, begin, strict=True))
        part = local.read(at, inner)
        if inner == sizes:
            return part
        if result is None:
            result = torch.empty(sizes, dtype=dtype, device="cpu")
        result[box_slices(offsets, low, inner)] = part
    return torch.empty(sizes, dtype=dtype, device="cpu") if result is None else result
