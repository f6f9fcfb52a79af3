"""Make the global plan of a save: from the local plans of all ranks to the chunks that each writes.

A rank writes the chunks that it alone holds, without being asked. Chunks with replicas are divided
among the ranks that hold them (plan.replica_assignment), and rank 0 sends each its share. Frozen
weights are divided separately, so that their files do not depend on the other entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardckpt.errors import CoverageError
from shardckpt.format.number_lists import Ints
from shardckpt.format.tiling import Gap, first_gap, stable_order
from shardckpt.plan.local_plan import (
    ChunkTable,
    LocalPlan,
    TensorSpec,
    flat_boxes,
    pack_columns,
    pad_shapes,
    unpack_columns,
    widen_boxes,
)
from shardckpt.plan.replica_assignment import Rows, assign_replicas, concatenate_rows, group_equal
from shardckpt.plan.shard_layout import FileLayout, chunk_bytes, item_sizes, tensor_blocks
from shardckpt.state.file_groups import FROZEN, GROUP_COUNT, MAIN, files_of

__all__ = ["GlobalPlan", "RankWrites", "check_coverage", "global_plan", "layout_order"]

SMALL_BYTES = 16 << 10
"""Smaller chunks, in bytes, are stored side by side in their file: counters, biases, norms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWrites:
    """The chunks that one rank writes, in the order of its files.

    Attributes:
        row: The row of each chunk [m] in the rank's local plan.
        boxes: The boxes of the global tensors to write [m, 2, D].
        files: The file group of each file, and the number of chunks in it.
        compare: Rows of the local plan that other ranks hold as well.
        layouts: The layout of each file, by file group. They follow from the plan alone, and are
            kept for the next save.
    """

    row: Ints
    boxes: Ints
    files: tuple[tuple[int, int], ...]
    compare: Ints
    layouts: dict[int, FileLayout] = field(default_factory=dict)

    @classmethod
    def of(cls, local: LocalPlan, share: bytes) -> RankWrites:
        """Combine the chunks that only this rank holds, and its share of the replicated chunks.

        `share` is the message of rank 0 (GlobalPlan.shares).
        """
        replicated, compare, file_groups, numbers = msgspec.msgpack.decode(
            share, type=tuple[bytes, bytes, bytes, bytes]
        )
        assigned = ChunkTable.unpack(replicated)
        held = local.chunks
        solo = np.flatnonzero(~local.shared)
        dims = max(held.boxes.shape[2], assigned.boxes.shape[2])
        row = np.concatenate([solo, assigned.tensor])
        boxes = np.concatenate(
            [widen_boxes(b, dims=dims) for b in (held.boxes[solo], assigned.boxes)]
        )
        specs = (*local.common, *local.rank_only)
        chunks = ChunkTable(tensor=held.tensor[row], boxes=boxes)
        file_group = local.file_group
        if file_groups:  # those that rank 0 has chosen for the tensors in common
            file_group = np.append(
                unpack_columns(file_groups)[:, 0], file_group[len(local.common) :]
            )
        file = files_of(file_group[chunks.tensor], chunk_bytes(specs, chunks))
        place = None
        if numbers:  # rank 0 knows the tensors in common in another order
            place = np.arange(len(specs))
            place[np.argsort(unpack_columns(numbers)[:, 0])] = np.arange(len(local.common))
        order = layout_order(specs, chunks, file, place)
        counts = [n.tolist() for n in np.unique(file, return_counts=True)]
        return cls(
            row=row[order],
            boxes=boxes[order],
            files=tuple(zip(*counts, strict=True)) or ((MAIN, 0),),
            compare=unpack_columns(compare)[:, 0],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalPlan:
    """The plan of a save: all tensors, and the chunks that each rank writes.

    Rank r writes the chunks in rows `bounds[r]` to `bounds[r + 1]` of `chunks`, in this order.
    `shares[r]` is the input of RankWrites.of. Rank r compares `compared[r]` replicas. `group` has
    the sets of these replicas, of all ranks in turn, and `replicated` [g] has the tensor of each
    set.
    """

    specs: tuple[TensorSpec, ...]
    chunks: ChunkTable
    bounds: Ints
    shares: tuple[bytes, ...]
    compared: Ints
    group: Ints
    replicated: Ints

    def of_rank(self, rank: int) -> ChunkTable:
        """Return the chunks in the shard of a rank."""
        rows = slice(self.bounds[rank], self.bounds[rank + 1])
        return ChunkTable(tensor=self.chunks.tensor[rows], boxes=self.chunks.boxes[rows])


def layout_order(
    specs: Sequence[TensorSpec],
    chunks: ChunkTable,
    file: Ints | None = None,
    place: Ints | None = None,
) -> Ints:
    """Return the order of chunks on disk.

    Chunks are sorted by file, if `file` [n] has their files, then by falling item size, so that
    chunks are aligned without padding. Small chunks come last, as they are read in one block and
    some are written by other ranks. Chunks that are equal in this respect have the order of their
    tensors: that of `specs`, or `place` [t], the place of each tensor.
    """
    items = item_sizes(specs)
    widths = np.unique(items)[::-1]
    small = chunk_bytes(specs, chunks) < SMALL_BYTES
    key = np.searchsorted(-widths, -items)[chunks.tensor] * 2 + small
    if file is not None:
        key += file * (len(widths) * 2)
    key = key * len(specs) + (chunks.tensor if place is None else place[chunks.tensor])
    if (np.diff(key) > 0).all():
        return np.arange(len(key))
    order = np.argsort(key, kind="stable")
    if (np.diff(key[order]) > 0).all():
        return order
    return np.lexsort((*chunks.boxes[:, 0, ::-1].T, key)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The tensors of all ranks, numbered. `file_group` [n] is that of the first rank that holds a
    tensor; `of_common[r]` are the numbers of rank r's tensors in common, all of its own follow."""

    specs: tuple[TensorSpec, ...]
    file_group: Ints
    of_common: Sequence[Ints]
    rank_only_offset: Ints

    @classmethod
    def of(
        cls, plans: Sequence[LocalPlan], common: Sequence[tuple[TensorSpec, ...]] | None
    ) -> _Numbers:
        number: dict[str, int] = {}
        first = plans[0].common if common is None else ()
        every = list(first)
        if common is None:
            of_common: Sequence[Ints] = [np.arange(len(first))] * len(plans)
        else:
            for specs in common:
                for spec in specs:
                    if number.setdefault(spec.name, len(every)) == len(every):
                        every.append(spec)
            of_common = [np.array([number[s.name] for s in specs], np.int64) for specs in common]
        counts = np.array([len(plan.rank_only) for plan in plans])
        file_group = np.concatenate(
            [np.zeros(len(every), np.int64)]
            + [plan.file_group[len(at) :] for plan, at in zip(plans, of_common, strict=True)]
        )
        ranks = range(len(plans)) if common is not None else (0,)
        for rank in reversed(ranks):
            file_group[of_common[rank]] = plans[rank].file_group[: len(of_common[rank])]
        rank_only_offset = len(every) + np.cumsum(counts) - counts
        every += [spec for plan in plans for spec in plan.rank_only]
        return cls(tuple(every), file_group, of_common, rank_only_offset)

    def of_chunks(self, plans: Sequence[LocalPlan]) -> Ints:
        """Return the tensor of each chunk, of all ranks in turn."""
        columns = []
        for rank, plan in enumerate(plans):
            tensor, at = plan.chunks.tensor, self.of_common[rank]
            if len(plan.rank_only):
                own = np.arange(len(plan.rank_only)) + self.rank_only_offset[rank]
                tensor = np.concatenate([at, own])[tensor]
            elif at is not self.of_common[0]:  # numbered from 0
                tensor = at[tensor]
            columns.append(tensor)
        return np.concatenate(columns)


def global_plan(
    plans: Sequence[LocalPlan], common: Sequence[tuple[TensorSpec, ...]] | None = None
) -> GlobalPlan:
    """Make the global plan from the local plans of all ranks, in rank order. Pure.

    The common tensors are those of the first plan, or `common[r]` if they differ between ranks.
    Raises CoverageError if the chunks of a tensor overlap, leave a gap or are out of bounds.
    """
    numbers = _Numbers.of(plans, common)
    specs, file_group = numbers.specs, numbers.file_group
    rows, shared = _gather_rows(plans, numbers)
    solo = rows.take(~shared) if shared.any() else rows
    replicated = rows.take(shared)
    keys = np.column_stack([replicated.tensor, flat_boxes(replicated.boxes)])
    first, group = group_equal(keys)
    unique_keys = concatenate_rows([solo, replicated.take(first)])
    table = ChunkTable(tensor=unique_keys.tensor, boxes=unique_keys.boxes)
    check_coverage(specs, table, unique_keys.rank)
    ranks = np.arange(len(plans) + 1)
    assigned = _divide(solo, replicated, group, file_group >= FROZEN, world_size=len(plans))
    assigned = assigned.take(stable_order(assigned.rank, below=len(plans)))
    several = np.bincount(group, minlength=len(first))[group] > 1
    compare = replicated.row[several]
    assigned_bounds = np.searchsorted(assigned.rank, ranks)
    compared = np.searchsorted(replicated.rank[several], ranks)
    written = concatenate_rows([solo, assigned])
    chunks = ChunkTable(tensor=written.tensor, boxes=written.boxes)
    file = files_of(file_group[written.tensor], written.size_bytes, written.rank)
    order = layout_order(specs, chunks, written.rank * GROUP_COUNT + file)
    return GlobalPlan(
        specs=specs,
        chunks=ChunkTable(tensor=chunks.tensor[order], boxes=chunks.boxes.take(order, axis=0)),
        bounds=np.searchsorted(written.rank[order], ranks),
        shares=_shares(plans, numbers, assigned, compare, assigned_bounds, compared),
        compared=np.diff(compared),
        group=group[several],
        replicated=replicated.tensor[first],
    )


def _divide(
    solo: Rows, replicated: Rows, group: Ints, frozen: NDArray[np.bool_], *, world_size: int
) -> Rows:
    """Assign the replicated chunks to ranks. Frozen tensors are balanced separately."""
    divided = []
    for selected in (frozen, ~frozen):
        shared, held = selected[replicated.tensor], selected[solo.tensor]
        loads: NDArray[np.float64] = np.bincount(
            solo.rank[held], weights=solo.size_bytes[held], minlength=world_size
        ).astype(np.float64)
        divided.append(assign_replicas(replicated.take(shared), group[shared], loads))
    return concatenate_rows(divided)


def _shares(
    plans: Sequence[LocalPlan],
    numbers: _Numbers,
    assigned: Rows,
    compare: Ints,
    assigned_bounds: Ints,
    compared: Ints,
) -> tuple[bytes, ...]:
    """Return the message to each rank.

    It has the replicated chunks that the rank writes, and those that it compares. It has the file
    groups of the tensors in common, if they differ from those of the rank's own plan, and the
    numbers of these tensors, if the rank has them in another order.
    """

    def share(
        part: slice, rows: Ints, file_groups: Ints | None = None, order: Ints | None = None
    ) -> bytes:
        table = ChunkTable(tensor=assigned.row[part], boxes=assigned.boxes[part])
        columns = pack_columns(rows.reshape(-1, 1))
        packed = [
            b"" if c is None else pack_columns(c.reshape(-1, 1)) for c in (file_groups, order)
        ]
        return msgspec.msgpack.encode((table.pack(), columns, *packed))

    def other_groups(held: Ints, at: Ints) -> Ints | None:
        file_groups = numbers.file_group[at]
        return None if np.array_equal(held[: len(at)], file_groups) else file_groups

    def other_order(at: Ints) -> Ints | None:
        return None if (np.diff(at) > 0).all() else at

    nothing = share(slice(0, 0), compare[:0])
    shares = []
    # Most ranks have the same two arrays.
    others: dict[tuple[int, int], tuple[Ints | None, Ints | None]] = {}
    for rank, plan in enumerate(plans):
        part = slice(assigned_bounds[rank], assigned_bounds[rank + 1])
        rows = compare[compared[rank] : compared[rank + 1]]
        at = numbers.of_common[rank]
        arrays = id(plan.file_group), id(at)
        if arrays not in others:
            others[arrays] = other_groups(plan.file_group, at), other_order(at)
        file_groups, order = others[arrays]
        empty = part.start == part.stop and not len(rows) and file_groups is None and order is None
        shares.append(nothing if empty else share(part, rows, file_groups, order))
    return tuple(shares)


def _gather_rows(plans: Sequence[LocalPlan], numbers: _Numbers) -> tuple[Rows, NDArray[np.bool_]]:
    """Return the chunks of all ranks, with a mask of those that may have replicas."""
    dims = max((plan.chunks.boxes.shape[2] for plan in plans), default=0)
    counts = [len(plan.chunks) for plan in plans]
    rank = np.repeat(np.arange(len(plans)), counts)
    row = np.arange(len(rank))
    row -= np.repeat(np.cumsum(counts) - counts, counts)
    tensor = numbers.of_chunks(plans)
    boxes = np.concatenate([widen_boxes(plan.chunks.boxes, dims=dims) for plan in plans])
    rows = Rows(
        rank=rank,
        row=row,
        tensor=tensor,
        boxes=boxes,
        size_bytes=chunk_bytes(numbers.specs, ChunkTable(tensor=tensor, boxes=boxes)),
    )
    return rows, np.concatenate([plan.shared for plan in plans])


def check_coverage(specs: Sequence[TensorSpec], chunks: ChunkTable, rank: Ints) -> None:
    """Raise CoverageError if the chunks do not tile each tensor.

    `rank` [n] has the rank of each chunk.
    """
    dims = max([chunks.boxes.shape[2], *(len(spec.shape) for spec in specs)])
    for block, rows, ends in tensor_blocks(chunks.tensor, len(specs)):
        shapes = pad_shapes([spec.shape for spec in specs[block]], dims=dims)
        boxes = widen_boxes(chunks.boxes.take(rows, axis=0), dims=dims)
        gap = first_gap(shapes, np.array([0, *ends]), boxes[:, 0], boxes[:, 1])
        if gap is not None:
            index, found = gap
            part = slice([0, *ends][index], ends[index])
            raise _coverage_error(specs[block][index], found, boxes[part], rank[rows[part]])


def _coverage_error(spec: TensorSpec, gap: Gap, boxes: Ints, rank: Ints) -> CoverageError:
    """Return the error for a gap in a tensor, with its boxes [m, 2, D] and their ranks [m]."""
    problem, offsets, sizes = gap
    (low, high), (begin, end) = (
        (at, at + size)
        for at, size in ((boxes[:, 0], boxes[:, 1]), (np.array(offsets), np.array(sizes)))
    )
    if problem == "overlap":
        holding = ((low < end) & (high > begin)).all(axis=1)
    else:  # no rank holds a hole
        holding = ((low == begin) & (high == end)).all(axis=1)
    offsets, sizes = offsets[: len(spec.shape)], sizes[: len(spec.shape)]
    return CoverageError(
        f"The chunks of the ranks do not tile the tensor: {problem}",
        tensor=spec.name,
        rank=tuple(np.unique(rank[holding]).tolist()) or None,
        expected=f"every element of shape {list(spec.shape)} exactly once",
        actual=f"{problem} at offsets {list(offsets)}, sizes {list(sizes)}",
        remedy="save the state on all ranks of the mesh, each with its own part",
    )
