"""Which bytes of which shards fill a tensor, and where they go.

A read is a run of bytes of a shard, and its place: an address, where the run lands as it
is, or a tensor view that it is copied into (strided, of another dtype, or on a device).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from shardckpt.format.dtypes import DTYPES, itemsize
from shardckpt.format.manifest import TensorEntry
from shardckpt.planning.chunks import LocalChunk, box_slices

__all__ = ["WINDOW_BYTES", "CopyRead", "DirectRead", "Read", "plan_reads"]

WINDOW_BYTES = 4 << 20
"""Shards are read in windows of this size, at multiples of it; no read crosses one unless its
bytes land as they are."""


@dataclass(frozen=True, slots=True)
class DirectRead:
    """Bytes [begin, end) of the file of shard number `shard` go to `address` as they are."""

    shard: int
    begin: int
    end: int
    address: int


@dataclass(frozen=True, slots=True)
class CopyRead:
    """Bytes [begin, end) hold a box of `sizes` elements with `strides` (in elements) of
    `dtype`, beginning at `begin`; it is copied into `into`."""

    shard: int
    begin: int
    end: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    into: torch.Tensor


Read = DirectRead | CopyRead


def plan_reads(entry: TensorEntry, target: LocalChunk) -> Iterator[Read]:
    """The reads that fill a box of a saved tensor. Pure.

    `target.data` has the sizes of the box; its dtype and device may differ from what was
    saved (copying casts).
    """
    if 0 in target.sizes:
        return
    data = target.data
    as_is = data.is_cpu and data.dtype == DTYPES[entry.dtype]
    chunks = entry.chunks
    dims = len(entry.shape)
    if len(chunks) == 1 and target.sizes == entry.shape:
        shard, begin, end = chunks[0, :3].tolist()
        if as_is and data.is_contiguous():
            yield DirectRead(shard, begin, end, data.data_ptr())
        else:
            yield from _cut_reads(shard, begin, entry.dtype, entry.shape, data)
        return
    offsets, sizes = chunks[:, 3 : 3 + dims], chunks[:, 3 + dims :]
    want = np.array([target.offsets, target.sizes], dtype=np.int64).reshape(2, dims)
    low = np.maximum(offsets, want[0])
    high = np.minimum(offsets + sizes, want[0] + want[1])
    for index in np.flatnonzero((high > low).all(axis=1)).tolist():
        start, size = low[index].tolist(), (high[index] - low[index]).tolist()
        place = data[box_slices(target.offsets, start, size)]
        held = sizes[index].tolist()
        strides = _row_major(held)
        first = sum(
            (a - b) * s for a, b, s in zip(start, offsets[index].tolist(), strides, strict=True)
        )
        shard = int(chunks[index, 0])
        begin = int(chunks[index, 1]) + first * itemsize(entry.dtype)
        if as_is and place.is_contiguous() and _is_run(size, held):
            length = math.prod(size) * itemsize(entry.dtype)
            yield DirectRead(shard, begin, begin + length, place.data_ptr())
        else:
            yield from _cut_reads(shard, begin, entry.dtype, size, place, held)


def _row_major(sizes: list[int] | tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * sizes[dim + 1]
    return tuple(strides)


def _is_run(part: list[int], whole: list[int]) -> bool:
    """Whether a box of sizes `part` in a row-major array of sizes `whole` is one run of bytes."""
    dim = 0
    while dim < len(part) and part[dim] == 1:
        dim += 1
    return all(a == b for a, b in zip(part[dim + 1 :], whole[dim + 1 :], strict=True))


def _cut_reads(
    shard: int,
    begin: int,
    dtype: str,
    sizes: list[int] | tuple[int, ...],
    into: torch.Tensor,
    whole: list[int] | tuple[int, ...] | None = None,
) -> Iterator[CopyRead]:
    """CopyReads for a box, none of which crosses the border of a window.

    A box that does is cut along its first dimension: what comes before the border, the row
    that lies across it (cut in turn), and the rest.
    """
    width = itemsize(dtype)
    strides = _row_major(whole if whole is not None else sizes)

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
                yield CopyRead(shard, begin, end, DTYPES[dtype], part, strides, into)
                return
            before = max(0, (border - begin - inner) // row + 1)
            if before:
                part, end = (before, *sizes[1:]), begin + (before - 1) * row + inner
                yield CopyRead(shard, begin, end, DTYPES[dtype], part, strides, into[:before])
            across = -(-(border - begin) // row)
            if across > before:
                yield from cut(begin + before * row, sizes[1:], strides[1:], into[before])
            begin, count, into = begin + across * row, count - across, into[across:]

    yield from cut(begin, tuple(sizes), strides, into)


def _span(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided box, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
