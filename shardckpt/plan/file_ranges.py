"""Divide files among the ranks that write them, into ranges of even size. Pure."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.format.safetensors_header import HEADER_ALIGN

__all__ = ["FileRange", "file_ranges"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """The bytes of a file from `begin` to `end`.

    `begin` is a multiple of a block, and so is `end`, unless it is None: the end of the file.
    """

    file: int
    begin: int
    end: int | None


def file_ranges(
    sizes_bytes: Sequence[int], *, rank: int, world_size: int, one_rank_per_file: bool = False
) -> Iterator[FileRange]:
    """Yield the ranges that a rank writes, in order.

    The ranges of all ranks cover every file. A range that begins at 0 includes the header. A range
    is at least a block long, unless it is a complete file.

    Args:
        sizes_bytes: The bytes of data of each file.
        rank: The rank.
        world_size: The number of ranks.
        one_rank_per_file: Never divide a file.
    """
    ends = list(itertools.accumulate(size + HEADER_ALIGN for size in sizes_bytes))
    begins = [0, *ends]

    def cut(bound: int) -> tuple[int, int]:
        """Return the file and byte of the border between ranges that is nearest to `bound`."""
        if bound >= begins[-1]:
            return len(ends), 0
        file = bisect_right(ends, bound)
        size = ends[file] - begins[file]
        if one_rank_per_file:
            return file + (2 * (bound - begins[file]) >= size), 0
        at = round((bound - begins[file]) / BLOCK_BYTES) * BLOCK_BYTES
        return (file, at) if at == 0 or size - at >= BLOCK_BYTES else (file + 1, 0)

    total = begins[-1]
    file, begin = cut(total * rank // world_size)
    last, end = cut(total * (rank + 1) // world_size)
    while (file, begin) < (last, end):
        yield FileRange(file=file, begin=begin, end=end if file == last else None)
        file, begin = file + 1, 0
