"""Who writes what: from every rank's local plan to the chunks that each rank writes.

Chunks that one rank alone holds are written by it. Chunks with replicas are strung
together, in order, into one long run of bytes for each set of replicas, and the run is
cut where every rank has the same number of bytes to write in all: so a replicated state
costs each rank 1/N of its bytes, few tensors are cut, and small ones never are. Frozen
weights are divided by themselves, so that their files don't depend on what else is saved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardckpt.errors import CoverageError
from shardckpt.format.boxes import find_gap
from shardckpt.format.dtypes import itemsize
from shardckpt.planning.assembly import chunk_bytes
from shardckpt.planning.kinds import FROZEN, MAIN, files_of
from shardckpt.planning.table import ChunkTable, Ints, LocalPlan, TensorSpec, widen_boxes

__all__ = ["GlobalPlan", "RankWrites", "check_coverage", "global_plan", "layout_order"]

SPLIT_BYTES = 1 << 20
"""A replicated chunk smaller than this is written whole by one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWrites:
    """What one rank writes, in the order of its shard.

    `row` [m]: which of the rank's local chunks; `boxes` [m, 2, D]: the part of the global
    tensor to write of it. `files`: the kind (see planning/kinds) of each file of the shard, and
    how many of the chunks it holds. `compare`: local rows that other ranks hold as well.
    """

    row: Ints
    boxes: Ints
    files: tuple[tuple[int, int], ...]
    compare: Ints

    def pack(self) -> bytes:
        """As bytes, for the way from rank 0."""
        writes = ChunkTable(tensor=self.row, boxes=self.boxes).pack()
        compare = self.compare.astype("<i8").tobytes()
        return msgspec.msgpack.encode((writes, self.files, compare))

    @classmethod
    def unpack(cls, data: bytes) -> RankWrites:
        """The writes that `pack` made these bytes of."""
        packed, files, compare = msgspec.msgpack.decode(
            data, type=tuple[bytes, tuple[tuple[int, int], ...], bytes]
        )
        writes = ChunkTable.unpack(packed)
        return cls(
            row=writes.tensor,
            boxes=writes.boxes,
            files=files,
            compare=np.frombuffer(compare, dtype="<i8"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalPlan:
    """The plan of a save: all tensors, and for each rank what it writes.

    `tensor[r]` [m] indexes `specs` for each write of rank r; `group[r]` numbers the sets
    of replicas that the rows in `ranks[r].compare` belong to, and `replicated` [g] the
    tensors of these sets.
    """

    specs: tuple[TensorSpec, ...]
    ranks: tuple[RankWrites, ...]
    tensor: tuple[Ints, ...]
    group: tuple[Ints, ...]
    replicated: Ints


@dataclass(slots=True)
class _Rows:
    """The chunks of all ranks, one row each."""

    rank: Ints
    row: Ints
    tensor: Ints
    boxes: Ints
    shared: NDArray[np.bool_]
    size_bytes: Ints

    def take(self, index: NDArray[np.generic]) -> _Rows:
        return _Rows(*(getattr(self, name)[index] for name in self.__slots__))


def layout_order(specs: Sequence[TensorSpec], tensor: Ints, boxes: Ints) -> Ints:
    """The order of chunks in a shard: by falling item size, so that each lies aligned in the
    file without padding, then as in the state."""
    sizes = np.array([itemsize(spec.dtype) for spec in specs], dtype=np.int64)[tensor]
    keys = [boxes[:, 0, dim] for dim in reversed(range(boxes.shape[2]))]
    return np.lexsort((*keys, tensor, -sizes)).astype(np.int64)


def global_plan(plans: Sequence[LocalPlan]) -> GlobalPlan:
    """Plan a save from the local plans of all ranks, in rank order. Pure.

    The tensors in common are taken from the first plan. Raises CoverageError where the
    chunks of a tensor overlap, leave a hole or reach beyond it.
    """
    specs = (*plans[0].common, *(spec for plan in plans for spec in plan.own))
    rows = _gather_rows(plans, specs)
    solo = rows.take(np.flatnonzero(~rows.shared))
    replicated = rows.take(np.flatnonzero(rows.shared))
    first, group = _group(np.column_stack([replicated.tensor, _flat(replicated.boxes)]))
    distinct = replicated.take(first)
    check_coverage(
        specs,
        np.concatenate([solo.tensor, distinct.tensor]),
        np.concatenate([solo.boxes, distinct.boxes]),
    )
    common = len(plans[0].common)
    kind = np.concatenate([plans[0].kind[:common], *(plan.kind[common:] for plan in plans)])
    divided = _divide_by_kind(solo, replicated, group, kind >= FROZEN, world_size=len(plans))
    counts = np.bincount(group, minlength=len(first))
    several = counts[group] > 1
    ranks, tensors, groups = [], [], []
    for rank in range(len(plans)):
        mine = solo.rank == rank
        won = divided.rank == rank
        row = np.concatenate([solo.row[mine], divided.row[won]])
        tensor = np.concatenate([solo.tensor[mine], divided.tensor[won]])
        boxes = np.concatenate([solo.boxes[mine], divided.boxes[won]])
        order = layout_order(specs, tensor, boxes)
        file = files_of(kind[tensor], chunk_bytes(specs, tensor, boxes))[order]
        order = order[np.argsort(file, kind="stable")]
        counts_by_file = zip(
            *(n.tolist() for n in np.unique(file, return_counts=True)), strict=True
        )
        compare = several & (replicated.rank == rank)
        ranks.append(
            RankWrites(
                row=row[order],
                boxes=boxes[order],
                files=tuple(counts_by_file) or ((MAIN, 0),),
                compare=replicated.row[compare],
            )
        )
        tensors.append(tensor[order])
        groups.append(group[compare])
    return GlobalPlan(
        specs=specs,
        ranks=tuple(ranks),
        tensor=tuple(tensors),
        group=tuple(groups),
        replicated=replicated.tensor[first],
    )


def _gather_rows(plans: Sequence[LocalPlan], specs: Sequence[TensorSpec]) -> _Rows:
    dims = max((plan.chunks.boxes.shape[2] for plan in plans), default=0)
    common = len(plans[0].common)
    base, tensors, boxes = common, [], []
    for plan in plans:
        index = plan.chunks.tensor
        tensors.append(np.where(index < common, index, index - common + base))
        base += len(plan.own)
        boxes.append(widen_boxes(plan.chunks.boxes, dims=dims))
    tensor, box = np.concatenate(tensors), np.concatenate(boxes)
    items = np.array([itemsize(spec.dtype) for spec in specs], dtype=np.int64)
    return _Rows(
        rank=np.repeat(np.arange(len(plans)), [len(plan.chunks) for plan in plans]),
        row=np.concatenate([np.arange(len(plan.chunks)) for plan in plans]),
        tensor=tensor,
        boxes=box,
        shared=np.concatenate([plan.shared for plan in plans]),
        size_bytes=box[:, 1].prod(axis=1) * items[tensor],
    )


def _flat(boxes: Ints) -> Ints:
    return boxes.reshape(len(boxes), 2 * boxes.shape[2])


def _group(keys: Ints) -> tuple[Ints, Ints]:
    """Index of the first row of each set of equal rows, and for each row the number of its set."""
    if len(keys) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    mixed = np.zeros(len(keys), dtype=np.uint64)
    for column in keys.T:
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    _, first, group = np.unique(mixed, return_index=True, return_inverse=True)
    if not np.array_equal(keys[first[group]], keys):  # two different rows with one hash
        _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # number the sets as they first appear
    rank_of = np.empty(len(first), dtype=np.int64)
    rank_of[order] = np.arange(len(first))
    return first[order].astype(np.int64), rank_of[group.reshape(-1)]


def check_coverage(specs: Sequence[TensorSpec], tensor: Ints, boxes: Ints) -> None:
    """Raise CoverageError unless the chunks (`tensor` [n], `boxes` [n, 2, D]) tile each tensor."""
    order = np.argsort(tensor, kind="stable")
    bounds = np.searchsorted(tensor[order], np.arange(len(specs) + 1))
    for index, spec in enumerate(specs):
        chunks = boxes[order[bounds[index] : bounds[index + 1]]]
        dims = len(spec.shape)
        if len(chunks) == 1 and tuple(chunks[0, 1, :dims]) == spec.shape:
            continue
        if 0 in spec.shape and len(chunks) == 0:
            continue
        gap = find_gap(spec.shape, chunks[:, 0, :dims], chunks[:, 1, :dims])
        if gap is not None:
            kind, offsets, sizes = gap
            raise CoverageError(
                f"The chunks that the ranks hold don't make up the tensor: {kind}",
                tensor=spec.name,
                expected=f"every element of shape {list(spec.shape)} exactly once",
                actual=f"{kind} at offsets {list(offsets)}, sizes {list(sizes)}",
                remedy="save the state of all ranks of the mesh, each with its own part",
            )


def _divide_by_kind(
    solo: _Rows, rows: _Rows, group: Ints, frozen: NDArray[np.bool_], *, world_size: int
) -> _Rows:
    """_divide for the frozen tensors and for all others: each evens out its own bytes."""
    divided = []
    for these in (frozen, ~frozen):
        mine, held = these[rows.tensor], these[solo.tensor]
        loads: NDArray[np.float64] = np.bincount(
            solo.rank[held], weights=solo.size_bytes[held], minlength=world_size
        ).astype(np.float64)
        divided.append(_divide(rows.take(mine), group[mine], loads))
    return _joined(divided)


def _joined(parts: Sequence[_Rows]) -> _Rows:
    return _Rows(*(np.concatenate([getattr(p, n) for p in parts]) for n in _Rows.__slots__))


def _divide(rows: _Rows, group: Ints, loads: NDArray[np.float64]) -> _Rows:
    """The rows of replicated chunks, each chunk or part of it left to one of its replicas."""
    order = np.lexsort((rows.rank, group))
    rows, group = rows.take(order), group[order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    counts = np.diff(np.append(starts, len(group)))
    if len(starts) == 0:
        return rows
    tags = np.random.default_rng(0).integers(1, 1 << 62, size=len(loads), dtype=np.uint64)
    members = np.add.reduceat(tags[rows.rank], starts)
    chosen: list[Ints] = []
    cuts: list[tuple[int, Ints]] = []  # (row, box) of the parts of chunks that were cut
    sets, of_set = np.unique(members, return_inverse=True)
    by_size = sorted(range(len(sets)), key=lambda s: int(counts[of_set == s][0]))
    for number in by_size:
        begin = starts[of_set == number]
        replicas = rows.rank[begin[0] : begin[0] + counts[of_set == number][0]]
        sizes = rows.size_bytes[begin]
        quota = _fill(loads[replicas], float(sizes.sum()))
        edges = np.concatenate([[0], np.cumsum(sizes)])
        bounds = [0, *(_cut(rows, begin, edges, at) for at in np.cumsum(quota)[:-1]), edges[-1]]
        bounds = list(np.maximum.accumulate(bounds))
        for position, (low, high) in enumerate(itertools.pairwise(bounds)):
            loads[replicas[position]] += high - low
            whole = (edges[:-1] >= low) & (edges[1:] <= high) & (sizes > 0)
            if position == 0:
                whole |= sizes == 0
            chosen.append(begin[whole] + position)
            for cut in np.flatnonzero(
                (edges[:-1] < high) & (edges[1:] > low) & ~whole & (sizes > 0)
            ):
                part = max(low, edges[cut]) - edges[cut], min(high, edges[cut + 1]) - edges[cut]
                cuts.append((int(begin[cut]) + position, _part(rows, int(begin[cut]), *part)))
    out = rows.take(np.concatenate(chosen))
    if not cuts:
        return out
    parts = rows.take(np.array([row for row, _ in cuts]))
    parts.boxes = np.stack([box for _, box in cuts])
    return _joined([out, parts])


def _fill(loads: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """How much of `amount` each of several unequal loads takes, so that they end up as even as
    can be: water filled into vessels of one level."""
    rising = np.sort(loads)
    level = rising[-1] + amount
    for count in range(1, len(rising) + 1):
        level = (amount + rising[:count].sum()) / count
        if count == len(rising) or level <= rising[count]:
            break
    shares: NDArray[np.float64] = np.maximum(level - loads, 0.0)
    return shares


def _row_dim(sizes: Ints) -> int:
    """The first dimension along which a box can be cut into runs of neighbouring bytes."""
    larger = np.flatnonzero(sizes > 1)
    return int(larger[0]) if len(larger) else 0


def _cut(rows: _Rows, begin: Ints, edges: Ints, at: float) -> int:
    """The place nearest to byte `at` of the run where it may be cut: a row of a large chunk, or
    the edge of a small one."""
    chunk = min(int(np.searchsorted(edges, at, side="right")) - 1, len(begin) - 1)
    low, high = int(edges[chunk]), int(edges[chunk + 1])
    if high - low < SPLIT_BYTES:
        return low if at - low < high - at else high
    sizes = rows.boxes[begin[chunk], 1]
    row_bytes = (high - low) // max(int(sizes[_row_dim(sizes)]), 1)
    return low + round((at - low) / row_bytes) * row_bytes


def _part(rows: _Rows, row: int, low: int, high: int) -> Ints:
    """The box of bytes [low, high) of a chunk; both are multiples of its row."""
    box: Ints = rows.boxes[row].copy()
    dim = _row_dim(box[1])
    row_bytes = int(rows.size_bytes[row]) // int(box[1, dim])
    assert math.prod(box[1, :dim].tolist()) == 1
    box[0, dim] += low // row_bytes
    box[1, dim] = (high - low) // row_bytes
    return box
