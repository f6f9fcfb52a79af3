"""Plan reads: the bytes of shards that fill boxes of tensors.

A read is a run of bytes of a shard, with its target: an address, if the bytes need no change, or a
view of a tensor to copy into (strided, of another dtype, or on a device).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shardckpt.format.divided_manifest import chunks_of
from shardckpt.format.dtype_names import itemsize
from shardckpt.format.dtypes import memory_dtype
from shardckpt.format.entries import TensorEntry
from shardckpt.format.number_lists import Ints
from shardckpt.io.tensor_memory import address_of
from shardckpt.state.local_chunks import LocalChunk, box_slices, has_file_layout

__all__ = ["WINDOW_BYTES", "CopyRead", "Reads", "plan_reads"]


WINDOW_BYTES = 4 << 20
"""The window in bytes in which shards are read. A read does not cross a multiple of it, unless its
bytes go to an address."""

_MANY_CHUNKS = 16
"""A tensor with more chunks is searched for those near a box."""


@dataclass(frozen=True, slots=True)
class CopyRead:
    """Bytes [begin, end) of a shard, from which a box is copied into `into`. The box has `sizes`
    elements with `strides` (in elements) of `dtype`."""

    shard: int
    begin: int
    end: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    into: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """The reads of a load.

    `direct` [n, 4] has a row for each run of bytes that goes to an address: number of the shard,
    begin and end in the file, address. `copies` has all other reads. The caller must keep the
    tensors alive.
    """

    direct: Ints
    copies: list[CopyRead]

    def size_bytes(self) -> int:
        """Return the number of bytes of all reads."""
        copied = sum(copy.end - copy.begin for copy in self.copies)
        return int((self.direct[:, 2] - self.direct[:, 1]).sum()) + copied


def plan_reads(wanted: Iterable[tuple[TensorEntry, LocalChunk]]) -> Reads:
    """Plan the reads that fill boxes of saved tensors. Pure.

    The data of a chunk have the sizes of its box. Their dtype and device may differ from the saved
    ones; copying casts them.
    """
    complete: dict[int, list[tuple[Ints, int]]] = {}  # by their number of dimensions
    others: dict[int, list[tuple[TensorEntry, LocalChunk]]] = {}
    for pair in wanted:
        entry, target = pair
        shape = entry.shape
        if target.address and type(entry) is TensorEntry and target.sizes == shape:
            chunks = entry.chunks
            if len(chunks) == 1:
                complete.setdefault(len(shape), []).append((chunks, target.address))
                continue
        if 0 not in target.sizes:
            others.setdefault(len(shape), []).append(pair)
    plans = [_reads_of(dims, pairs) for dims, pairs in others.items()]
    direct = [*map(_complete_reads, complete.values()), *(plan.direct for plan in plans)]
    return Reads(
        direct=np.concatenate([np.empty((0, 4), np.int64), *direct]),
        copies=[copy for plan in plans for copy in plan.copies],
    )


def _complete_reads(pairs: list[tuple[Ints, int]]) -> Ints:
    """Return the direct reads of tensors with one chunk, which go to addresses as a whole."""
    chunks, addresses = zip(*pairs, strict=True)
    return np.column_stack([np.concatenate(chunks)[:, :3], np.array(addresses, dtype=np.int64)])


def _reads_of(dims: int, pairs: list[tuple[TensorEntry, LocalChunk]]) -> Reads:
    """Plan the reads for tensors of `dims` dimensions. See plan_reads."""
    held_chunks = _near(pairs, chunks_of(pairs), dims)
    chunks = np.concatenate(held_chunks)
    owner = np.repeat(np.arange(len(pairs)), list(map(len, held_chunks)))
    held_at, held = chunks[:, 3 : 3 + dims], chunks[:, 3 + dims :]
    want_at = _rows([t.offsets for _, t in pairs], dims)[owner]
    want = _rows([t.sizes for _, t in pairs], dims)[owner]
    low = np.maximum(held_at, want_at)
    size = np.minimum(held_at + held, want_at + want) - low
    hit = np.flatnonzero((size > 0).all(axis=1))
    chunks, owner, low, size = chunks[hit], owner[hit], low[hit], size[hit]
    held_at, held, want_at, want = held_at[hit], held[hit], want_at[hit], want[hit]

    widths = {dtype: itemsize(dtype) for dtype in {entry.dtype for entry, _ in pairs}}
    width = np.array([widths[entry.dtype] for entry, _ in pairs], dtype=np.int64)[owner]
    begin = chunks[:, 1] + ((low - held_at) * _strides(held)).sum(axis=1) * width
    end = begin + size.prod(axis=1) * width
    into = np.array([t.address or address_of(t.data) for _, t in pairs], dtype=np.int64)[owner]
    into += ((low - want_at) * _strides(want)).sum(axis=1) * width
    lies = [t.address != 0 or has_file_layout(t.data, entry.dtype) for entry, t in pairs]
    as_is = np.array(lies, dtype=np.bool_)[owner]
    as_is &= _are_runs(size, held) & _are_runs(size, want)

    copies: list[CopyRead] = []
    for row in np.flatnonzero(~as_is).tolist():
        entry, target = pairs[owner[row]]
        sizes = size[row].tolist()
        into_view = target.data.detach()[box_slices(target.offsets, low[row].tolist(), sizes)]
        shard, at = int(chunks[row, 0]), int(begin[row])
        copies += _cut_reads(shard, at, entry.dtype, sizes, into_view, held[row].tolist())
    direct = np.column_stack([chunks[:, 0], begin, end, into])[as_is]
    return Reads(direct=direct, copies=copies)


def _near(
    pairs: list[tuple[TensorEntry, LocalChunk]], held_chunks: list[Ints], dims: int
) -> list[Ints]:
    """Leave out chunks that end before a box, or begin after it, in the dimension that most divides
    the tensor. Otherwise m boxes of a tensor with n chunks would take n * m rows.
    """
    boxes_of: dict[int, list[int]] = {}
    for number, rows in enumerate(held_chunks):
        if len(rows) > _MANY_CHUNKS and dims:
            boxes_of.setdefault(id(rows), []).append(number)
    near = list(held_chunks)
    for numbers in boxes_of.values():
        if len(numbers) > 1:
            rows = held_chunks[numbers[0]]
            dim = max(range(dims), key=lambda dim: len(np.unique(rows[:, 3 + dim])))
            rows = rows[np.argsort(rows[:, 3 + dim], kind="stable")]
            begins = rows[:, 3 + dim]
            ends = np.maximum.accumulate(begins + rows[:, 3 + dims + dim])
            want_at = np.array([pairs[number][1].offsets[dim] for number in numbers])
            want = np.array([pairs[number][1].sizes[dim] for number in numbers])
            first = np.searchsorted(ends, want_at, side="right")
            last = np.searchsorted(begins, want_at + want, side="left")
            for number, low, high in zip(numbers, first.tolist(), last.tolist(), strict=True):
                near[number] = rows[low:high]
    return near


def _rows(numbers: list[tuple[int, ...]], dims: int) -> Ints:
    """Convert tuples of `dims` numbers to an array [n, dims]."""
    flat = itertools.chain.from_iterable(numbers)
    return np.fromiter(flat, np.int64, len(numbers) * dims).reshape(len(numbers), dims)


def _strides(sizes: Ints) -> Ints:
    """Return the row-major strides of boxes of these sizes, both [n, d]."""
    strides = np.ones_like(sizes)
    for dim in range(sizes.shape[1] - 2, -1, -1):
        strides[:, dim] = strides[:, dim + 1] * sizes[:, dim + 1]
    return strides


def _are_runs(part: Ints, full: Ints) -> NDArray[np.bool_]:
    """Whether boxes of sizes `part` are contiguous in row-major arrays of sizes `full`."""
    run = np.ones(len(part), dtype=np.bool_)
    # Whether a dimension of more than one element has occurred.
    inside = np.zeros(len(part), dtype=np.bool_)
    for dim in range(part.shape[1]):
        run &= ~inside | (part[:, dim] == full[:, dim])
        inside |= part[:, dim] > 1
    return run


def _cut_reads(
    shard: int,
    begin: int,
    dtype: str,
    sizes: list[int],
    into: torch.Tensor,
    full: list[int],
) -> Iterator[CopyRead]:
    """Yield CopyReads for a box of a row-major array of sizes `full`. None crosses a window's
    border.

    A box that crosses a border is divided along its first dimension: the rows before the border,
    the row across it (divided in turn), and the rows after it.
    """
    width, memory = itemsize(dtype), memory_dtype(dtype)
    products = itertools.accumulate(reversed(full[1:]), operator.mul, initial=1)
    strides = tuple(products)[::-1] if full else ()

    def cut(
        begin: int, sizes: tuple[int, ...], strides: tuple[int, ...], into: torch.Tensor
    ) -> Iterator[CopyRead]:
        while sizes and sizes[0] == 1:
            sizes, strides, into = sizes[1:], strides[1:], into[0]
        row = strides[0] * width if strides else 0
        inner = width * _span(sizes[1:], strides[1:])
        count = sizes[0] if sizes else 1
        while count:
            border = (begin // WINDOW_BYTES + 1) * WINDOW_BYTES
            if begin + (count - 1) * row + inner <= border:
                part = (count, *sizes[1:]) if sizes else ()
                end = begin + (count - 1) * row + inner
                yield CopyRead(shard, begin, end, memory, part, strides, into)
                return
            before = max(0, (border - begin - inner) // row + 1)
            if before:
                part, end = (before, *sizes[1:]), begin + (before - 1) * row + inner
                yield CopyRead(shard, begin, end, memory, part, strides, into[:before])
            across = -(-(border - begin) // row)
            if across > before:
                yield from cut(begin + before * row, sizes[1:], strides[1:], into[before])
            begin, count, into = begin + across * row, count - across, into[across:]

    yield from cut(begin, tuple(sizes), strides, into)


def _span(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of elements from the first to the last one of a strided box."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
