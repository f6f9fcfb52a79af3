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
from shardckpt.format.dtypes import itemsize
from shardckpt.format.tiling import first_gap, stable_order
from shardckpt.plan.local_plan import (
    ChunkTable,
    Ints,
    LocalPlan,
    TensorSpec,
    flat_boxes,
    pack_columns,
    pad_shapes,
    unpack_columns,
    widen_boxes,
)
from shardckpt.plan.replica_assignment import Rows, divide, group_equal, joined
from shardckpt.plan.shard_layout import chunk_bytes
from shardckpt.state.file_groups import FROZEN, KINDS, MAIN, files_of

__all__ = ["GlobalPlan", "RankWrites", "check_coverage", "global_plan", "layout_order"]

SMALL_BYTES = 16 << 10
"""Smaller chunks, in bytes, are stored side by side in their file: counters, biases, norms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWrites:
    """The chunks that one rank writes, in the order of its shard.

    `row` [m] is the row of the local chunk, and `boxes` [m, 2, D] the box of the global tensor to
    write. `files` has the kind of each file of the shard (see state.file_groups) with its number of
    chunks. `compare` has the local rows that other ranks hold too. `layouts` has the header and the
    size in bytes of each file by kind, once its layout is known.
    """

    row: Ints
    boxes: Ints
    files: tuple[tuple[int, int], ...]
    compare: Ints
    layouts: dict[int, tuple[bytes, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, local: LocalPlan, share: bytes) -> RankWrites:
        """What a rank writes: the chunks that it alone holds, and its share of the replicated
        chunks (GlobalPlan.shares)."""
        replicated, compare, kinds = msgspec.msgpack.decode(share, type=tuple[bytes, bytes, bytes])
        won = ChunkTable.unpack(replicated)
        held = local.chunks
        solo = np.flatnonzero(~local.shared)
        dims = max(held.boxes.shape[2], won.boxes.shape[2])
        row = np.concatenate([solo, won.tensor])
        boxes = np.concatenate([widen_boxes(b, dims=dims) for b in (held.boxes[solo], won.boxes)])
        specs = (*local.common, *local.own)
        chunks = ChunkTable(tensor=held.tensor[row], boxes=boxes)
        kind = local.kind
        if kinds:  # rank 0 sees the common tensors
            kind = np.append(unpack_columns(kinds)[:, 0], kind[len(local.common) :])
        file = files_of(kind[chunks.tensor], chunk_bytes(specs, chunks))
        order = layout_order(specs, chunks, file)
        counts = [n.tolist() for n in np.unique(file, return_counts=True)]
        return cls(
            row=row[order],
            boxes=boxes[order],
            files=tuple(zip(*counts, strict=True)) or ((MAIN, 0),),
            compare=unpack_columns(compare)[:, 0],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalPlan:
    """The plan of a save: all tensors, and what each rank writes.

    Rank r writes the chunks in rows `bounds[r]` to `bounds[r + 1]` of `chunks`, in this order.
    `shares[r]` is the input of RankWrites.of. Rank r compares `compared[r]` replicas; `group` has
    the sets of these replicas, of all ranks in turn, and `replicated` [g] the tensor of each set.
    """

    specs: tuple[TensorSpec, ...]
    chunks: ChunkTable
    bounds: Ints
    shares: tuple[bytes, ...]
    compared: Ints
    group: Ints
    replicated: Ints

    def of_rank(self, rank: int) -> ChunkTable:
        """The chunks in the shard of a rank."""
        rows = slice(self.bounds[rank], self.bounds[rank + 1])
        return ChunkTable(tensor=self.chunks.tensor[rows], boxes=self.chunks.boxes[rows])


def layout_order(specs: Sequence[TensorSpec], chunks: ChunkTable, file: Ints | None = None) -> Ints:
    """The order of chunks on disk.

    File by file, if `file` [n] numbers them. By falling item size, so that chunks are aligned
    without padding. Small chunks come last, side by side, since they are read in one block and some
    are written by other ranks. Finally in the order of the state.
    """
    items = np.array([itemsize(spec.dtype) for spec in specs], dtype=np.int64)
    widths = np.unique(items)[::-1]
    small = chunk_bytes(specs, chunks) < SMALL_BYTES
    key = np.searchsorted(-widths, -items)[chunks.tensor] * 2 + small
    if file is not None:
        key += file * (len(widths) * 2)
    key = key * len(specs) + chunks.tensor
    if (np.diff(key) > 0).all():
        return np.arange(len(key))
    order = np.argsort(key, kind="stable")
    if (np.diff(key[order]) > 0).all():
        return order
    return np.lexsort((*chunks.boxes[:, 0, ::-1].T, key)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The tensors of all ranks, numbered. `kind` [n] is the file group on the first rank that has
    the tensor. `of_common[r]` are the numbers of the common tensors of rank r; those of its own
    follow."""

    specs: tuple[TensorSpec, ...]
    kind: Ints
    of_common: Sequence[Ints]
    own_offset: Ints

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
        counts = np.array([len(plan.own) for plan in plans])
        kind = np.concatenate(
            [np.zeros(len(every), np.int64)]
            + [plan.kind[len(at) :] for plan, at in zip(plans, of_common, strict=True)]
        )
        said = range(len(plans)) if common is not None else (0,)
        for rank in reversed(said):
            kind[of_common[rank]] = plans[rank].kind[: len(of_common[rank])]
        own_offset = len(every) + np.cumsum(counts) - counts
        every += [spec for plan in plans for spec in plan.own]
        return cls(tuple(every), kind, of_common, own_offset)

    def of_chunks(self, plans: Sequence[LocalPlan]) -> Ints:
        """The tensor of each chunk, of all ranks in turn."""
        columns = []
        for rank, plan in enumerate(plans):
            tensor, at = plan.chunks.tensor, self.of_common[rank]
            if len(plan.own):
                own = np.arange(len(plan.own)) + self.own_offset[rank]
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
    specs, kind = numbers.specs, numbers.kind
    rows, shared = _gather_rows(plans, numbers)
    solo = rows.take(~shared) if shared.any() else rows
    replicated = rows.take(shared)
    keys = np.column_stack([replicated.tensor, flat_boxes(replicated.boxes)])
    first, group = group_equal(keys)
    unique_keys = joined([solo, replicated.take(first)])
    table = ChunkTable(tensor=unique_keys.tensor, boxes=unique_keys.boxes)
    check_coverage(specs, table, unique_keys.rank)
    ranks = np.arange(len(plans) + 1)
    won = _divide(solo, replicated, group, kind >= FROZEN, world_size=len(plans))
    won = won.take(stable_order(won.rank, below=len(plans)))
    several = np.bincount(group, minlength=len(first))[group] > 1
    compare = replicated.row[several]
    won_bounds = np.searchsorted(won.rank, ranks)
    compared = np.searchsorted(replicated.rank[several], ranks)
    written = joined([solo, won])
    chunks = ChunkTable(tensor=written.tensor, boxes=written.boxes)
    file = files_of(kind[written.tensor], written.size_bytes, written.rank)
    order = layout_order(specs, chunks, written.rank * KINDS + file)
    return GlobalPlan(
        specs=specs,
        chunks=ChunkTable(tensor=chunks.tensor[order], boxes=chunks.boxes[order]),
        bounds=np.searchsorted(written.rank[order], ranks),
        shares=_shares(plans, numbers, won, compare, won_bounds, compared),
        compared=np.diff(compared),
        group=group[several],
        replicated=replicated.tensor[first],
    )


def _divide(
    solo: Rows, replicated: Rows, group: Ints, frozen: NDArray[np.bool_], *, world_size: int
) -> Rows:
    """Assign the replicated chunks to ranks. Frozen tensors are balanced separately."""
    divided = []
    for these in (frozen, ~frozen):
        mine, held = these[replicated.tensor], these[solo.tensor]
        loads: NDArray[np.float64] = np.bincount(
            solo.rank[held], weights=solo.size_bytes[held], minlength=world_size
        ).astype(np.float64)
        divided.append(divide(replicated.take(mine), group[mine], loads))
    return joined(divided)


def _shares(
    plans: Sequence[LocalPlan],
    numbers: _Numbers,
    won: Rows,
    compare: Ints,
    won_bounds: Ints,
    compared: Ints,
) -> tuple[bytes, ...]:
    """The message to each rank: the replicated chunks that it writes and compares, and the file
    groups of the common tensors if they differ from those of the first rank that has them."""

    def share(part: slice, rows: Ints, kinds: Ints | None) -> bytes:
        table = ChunkTable(tensor=won.row[part], boxes=won.boxes[part])
        columns = pack_columns(rows.reshape(-1, 1))
        packed = b"" if kinds is None else pack_columns(kinds.reshape(-1, 1))
        return msgspec.msgpack.encode((table.pack(), columns, packed))

    nothing = share(slice(0, 0), compare[:0], None)
    shares = []
    for rank, plan in enumerate(plans):
        part = slice(won_bounds[rank], won_bounds[rank + 1])
        rows = compare[compared[rank] : compared[rank + 1]]
        at = numbers.of_common[rank]
        kinds = numbers.kind[at]
        other = None if np.array_equal(plan.kind[: len(at)], kinds) else kinds
        empty = part.start == part.stop and not len(rows) and other is None
        shares.append(nothing if empty else share(part, rows, other))
    return tuple(shares)


def _gather_rows(plans: Sequence[LocalPlan], numbers: _Numbers) -> tuple[Rows, NDArray[np.bool_]]:
    """The chunks of all ranks, with a mask of those that may have replicas."""
    dims = max((plan.chunks.boxes.shape[2] for plan in plans), default=0)
    counts = [len(plan.chunks) for plan in plans]
    rank = np.repeat(np.arange(len(plans)), counts)
    tensor = numbers.of_chunks(plans)
    boxes = np.concatenate([widen_boxes(plan.chunks.boxes, dims=dims) for plan in plans])
    rows = Rows(
        rank=rank,
        row=np.arange(len(rank)) - np.repeat(np.cumsum(counts) - counts, counts),
        tensor=tensor,
        boxes=boxes,
        size_bytes=chunk_bytes(numbers.specs, ChunkTable(tensor=tensor, boxes=boxes)),
    )
    return rows, np.concatenate([plan.shared for plan in plans])


def check_coverage(specs: Sequence[TensorSpec], chunks: ChunkTable, rank: Ints) -> None:
    """Raise CoverageError unless the chunks tile each tensor. `rank` [n] has the rank of each
    chunk."""
    dims = max([chunks.boxes.shape[2], *(len(spec.shape) for spec in specs)])
    shapes = pad_shapes([spec.shape for spec in specs], dims=dims)
    order = stable_order(chunks.tensor, below=len(specs))
    boxes = widen_boxes(chunks.boxes[order], dims=dims)
    bounds = np.searchsorted(chunks.tensor[order], np.arange(len(specs) + 1))
    found = first_gap(shapes, bounds, boxes[:, 0], boxes[:, 1])
    if found is None:
        return
    index, (kind, offsets, sizes) = found
    rows = slice(bounds[index], bounds[index + 1])
    (low, high), (begin, end) = (
        (at, at + size)
        for at, size in ((boxes[rows, 0], boxes[rows, 1]), (np.array(offsets), np.array(sizes)))
    )
    if kind == "overlap":
        holding = ((low < end) & (high > begin)).all(axis=1)
    else:  # no rank holds a hole
        holding = ((low == begin) & (high == end)).all(axis=1)
    spec = specs[index]
    offsets, sizes = offsets[: len(spec.shape)], sizes[: len(spec.shape)]
    raise CoverageError(
        f"The chunks of the ranks do not tile the tensor: {kind}",
        tensor=spec.name,
        rank=tuple(np.unique(rank[order][rows][holding]).tolist()) or None,
        expected=f"every element of shape {list(spec.shape)} exactly once",
        actual=f"{kind} at offsets {list(offsets)}, sizes {list(sizes)}",
        remedy="save the state on all ranks of the mesh, each with its own part",
    )
