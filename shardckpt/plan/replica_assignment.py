"""Choose which of the ranks that hold the same chunk writes it.

The replicated chunks of each set of ranks form one sequence of bytes. It is divided so that all
ranks write the same number of bytes in total. Each rank of a replicated state therefore writes 1/N
of its bytes; few tensors are divided, and small ones never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from shardckpt.format.number_lists import Ints
from shardckpt.format.tiling import stable_order

__all__ = ["Rows", "assign_replicas", "concatenate_rows", "group_equal"]

SPLIT_BYTES = 1 << 20
"""A smaller replicated chunk, in bytes, is never divided."""


@dataclass(slots=True, kw_only=True)
class Rows:
    """The chunks of all ranks, one in each row: its rank, its row in the local chunks, its tensor,
    its box [n, 2, D], and its size in bytes."""

    rank: Ints
    row: Ints
    tensor: Ints
    boxes: Ints
    size_bytes: Ints

    def __len__(self) -> int:
        return len(self.rank)

    def take(self, index: NDArray[np.generic]) -> Rows:
        """Select the rows of an index or mask."""
        if index.dtype == np.bool_:
            index = np.flatnonzero(index)
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        # Many times as fast as an index in brackets, for boxes.
        return Rows(**{name: column.take(index, axis=0) for name, column in columns.items()})


def concatenate_rows(parts: Sequence[Rows]) -> Rows:
    """Concatenate tables."""
    parts = [part for part in parts if len(part)] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(Rows)]
    return Rows(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def group_equal(keys: Ints) -> tuple[Ints, Ints]:
    """Group equal rows of `keys` [n, k].

    Returns:
        The first row of each group, and the number of the group of each row. Groups are numbered by
        first occurrence.
    """
    if len(keys) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    mixed = np.zeros(len(keys), dtype=np.uint64)
    for column in keys.T:
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    _, first, group = np.unique(mixed, return_index=True, return_inverse=True)
    if not np.array_equal(keys[first[group]], keys):  # two different rows with the same hash
        _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank_of = np.empty(len(first), dtype=np.int64)
    rank_of[order] = np.arange(len(first))
    return first[order].astype(np.int64), rank_of[group.reshape(-1)]


def assign_replicas(rows: Rows, group: Ints, loads: NDArray[np.float64]) -> Rows:
    """Assign each of the chunks in `rows`, or each part of it, to one of the ranks that hold it.

    `group` [n] numbers the sets of equal chunks. `loads` are the bytes that each rank writes; they
    are updated. Sets with few ranks are assigned first, as the chunks of large sets can balance all
    ranks.
    """
    order = np.lexsort((rows.rank, group))
    rows, group = rows.take(order), group[order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    counts = np.diff(np.append(starts, len(group)))
    if len(starts) == 0:
        return rows
    row_bytes = _row_bytes(rows, starts)
    tags = np.random.default_rng(0).integers(1, 1 << 62, size=len(loads), dtype=np.uint64)
    members = np.add.reduceat(tags[rows.rank], starts)
    _, first, of_set = np.unique(members, return_index=True, return_inverse=True)
    by_set = stable_order(of_set, below=len(first))
    ends = np.cumsum(np.bincount(of_set))
    parts: list[tuple[Ints, Ints, Ints]] = []
    for number in np.argsort(counts[first], kind="stable").tolist():
        chunks = by_set[ends[number - 1] if number else 0 : ends[number]]
        begin = starts[chunks]
        replicas = rows.rank[begin[0] : begin[0] + counts[chunks[0]]]
        sizes = rows.size_bytes[begin]
        quota = _fill(loads[replicas], float(sizes.sum()))
        bounds = _bounds(sizes, row_bytes[chunks], quota)
        loads[replicas] += np.diff(bounds)
        index, position, low, high = _divided(sizes, bounds)
        parts.append((begin[index] + position, low, high))
    row, low, high = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return _cut(rows.take(row), low, high)


def _fill(loads: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """Divide `amount` among unequal loads, to make them as even as possible (water filling)."""
    rising = np.sort(loads)
    levels = (amount + np.cumsum(rising)) / np.arange(1, len(rising) + 1)
    level = levels[int(np.append(levels[:-1] <= rising[1:], True).argmax())]
    shares: NDArray[np.float64] = np.maximum(level - loads, 0.0)
    return shares


def _row_dim(boxes: Ints) -> Ints:
    """Return, for each box, the first dimension of a size above 1, along which it can be
    divided.
    """
    dims: Ints = (boxes[:, 1] > 1).argmax(axis=1)
    return dims


def _row_bytes(rows: Rows, starts: Ints) -> Ints:
    """Return the bytes of one index along that dimension, for the chunks at `starts`; at least
    1.
    """
    boxes, size_bytes = rows.boxes[starts], rows.size_bytes[starts]
    if boxes.shape[2] == 0:
        return np.maximum(size_bytes, 1)
    along = boxes[np.arange(len(boxes)), 1, _row_dim(boxes)]
    row_bytes: Ints = np.maximum(size_bytes // np.maximum(along, 1), 1)
    return row_bytes


def _bounds(sizes: Ints, row_bytes: Ints, quota: NDArray[np.float64]) -> Ints:
    """Return the begin of the part of each rank, and the end of the sequence.

    Each is the position nearest to its quota at a row of a large chunk or at the border of a small
    one.
    """
    edges = np.concatenate([[0], np.cumsum(sizes)])
    at = np.cumsum(quota)[:-1]
    chunk = np.minimum(np.searchsorted(edges, at, side="right") - 1, len(sizes) - 1)
    low, high = edges[chunk], edges[chunk + 1]
    edge = np.where(at - low < high - at, low, high)
    row = low + np.rint((at - low) / row_bytes[chunk]).astype(np.int64) * row_bytes[chunk]
    cuts = np.where(high - low < SPLIT_BYTES, edge, row)
    bounds: Ints = np.maximum.accumulate(np.concatenate([[0], cuts, edges[-1:]]))
    return bounds


def _divided(sizes: Ints, bounds: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Return the parts into which `bounds` divide a sequence of chunks.

    They are (chunk, position of the replica that writes it, begin and end within the chunk).
    """
    edges = np.concatenate([[0], np.cumsum(sizes)])
    first = np.searchsorted(bounds, edges[:-1], side="right") - 1
    last = np.searchsorted(bounds, edges[1:], side="left") - 1
    first[sizes == 0] = last[sizes == 0] = 0
    counts = last - first + 1
    index = np.repeat(np.arange(len(sizes)), counts)
    position = first[index] + np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    low = np.maximum(bounds[position], edges[index]) - edges[index]
    high = np.minimum(bounds[position + 1], edges[index + 1]) - edges[index]
    empty = sizes[index] == 0
    low[empty] = high[empty] = 0
    kept = (high > low) | empty
    return index[kept], position[kept], low[kept], high[kept]


def _cut(rows: Rows, low: Ints, high: Ints) -> Rows:
    """Restrict the box of each row to its bytes [low, high), which are multiples of a row."""
    cut = np.flatnonzero(high - low < rows.size_bytes)
    if len(cut):
        boxes = rows.boxes[cut]
        dim = _row_dim(boxes)
        at = np.arange(len(cut))
        row_bytes = rows.size_bytes[cut] // boxes[at, 1, dim]
        boxes[at, 0, dim] += low[cut] // row_bytes
        boxes[at, 1, dim] = (high[cut] - low[cut]) // row_bytes
        rows.boxes[cut] = boxes
        rows.size_bytes[cut] = high[cut] - low[cut]
    return rows
