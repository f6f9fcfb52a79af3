"""A large manifest that the ranks of a load check together.

A large manifest has long lists of chunks: in each, a chunk for each rank that saved. Each rank
parses and checks some of these lists, for all ranks. Of the others it parses the chunks that it
reads. It checks these as well, so that it never depends on another rank for its own safety. Rank 0
compares the bytes of all chunks, which must not overlap.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from shardckpt.errors import CorruptionError
from shardckpt.format.dtype_names import itemsize
from shardckpt.format.entries import CheckedPart, Manifest, TensorEntry
from shardckpt.format.manifest import (
    LARGE_BYTES,
    TensorText,
    columns_of,
    decode_document,
    entries_of,
    from_bytes,
    manifest_of,
    shard_entries,
)
from shardckpt.format.number_lists import Ints, parse_lists
from shardckpt.format.validation import Columns, check_chunks, joined_ranges, overlap, shard_sizes

__all__ = ["LONG_BYTES", "check_manifest_parts", "chunks_of", "listed_tensor", "part_from_bytes"]

LONG_BYTES = 16 << 10
"""The text of a long list of chunks, in bytes. Every rank parses shorter lists completely."""
_MANY_BOXES = 16
"""The boxes of a tensor for which its list is parsed once, not searched for each box."""
_MOST_CHECKERS = 64
"""The number of ranks that check lists. Rank 0 receives their ranges."""
_NONE = msgspec.Raw(b"[]")


def part_from_bytes(data: bytes, *, path: str, rank: int, world_size: int) -> Manifest:
    """Parse a manifest, of which each rank checks a part. Not collective.

    Args:
        data: The bytes of the file.
        path: The path for error messages.
        rank: This rank.
        world_size: The number of ranks. All of them parse the manifest.

    Returns:
        The manifest. If it has a `part`, the manifest is valid once `check_manifest_parts` has
        passed on rank 0. It can be used before: the chunks of each tensor are checked when they are
        used.

    Raises:
        CheckpointError: See from_bytes.
    """
    if world_size == 1 or len(data) <= LARGE_BYTES:
        return from_bytes(data, path=path)
    document = decode_document(data, path)
    shards = tuple(shard_entries(document.shards, path))
    sizes = shard_sizes(shards)
    texts = document.tensors
    long = [name for name, text in texts.items() if len(memoryview(text.chunks)) > LONG_BYTES]
    without = {name: TensorText(texts[name].dtype, texts[name].shape, _NONE) for name in long}
    list(columns_of(without, path))  # checks dtypes and shapes
    short = {
        name: text for name, text in texts.items() if len(memoryview(text.chunks)) <= LONG_BYTES
    }
    columns = list(columns_of(short, path))
    own = list(columns_of({name: texts[name] for name in _own(long, rank, world_size)}, path))
    check_chunks([*columns, *own], sizes, path)
    parsed = entries_of(short, columns)
    tensors = {
        name: parsed.get(name) or listed_tensor(name, text, shard_sizes=sizes, path=path)
        for name, text in texts.items()
    }
    checked = [*own, *(columns if rank == 0 else ())]
    ranges = np.concatenate([np.empty((0, 3), np.int64), *(c.chunks[:, :3] for c in checked)])
    part = CheckedPart(digest=document.digest, ranges=joined_ranges(ranges, len(shards)))
    manifest = manifest_of(document, shards, tensors, path)
    return dataclasses.replace(manifest, part=part)


def _own(long: list[str], rank: int, world_size: int) -> list[str]:
    """Return the tensors whose lists this rank checks.

    They follow each other, as in shards: then their bytes join to few ranges.
    """
    checkers = min(world_size, _MOST_CHECKERS)
    begin, end = (-(-len(long) * min(at, checkers) // checkers) for at in (rank, rank + 1))
    return long[begin:end]


def listed_tensor(
    name: str, text: TensorText[msgspec.Raw], *, shard_sizes: Ints, path: str
) -> TensorEntry:
    """Return a tensor with a long list of chunks, which is parsed on demand.

    Args:
        name: The name of the tensor.
        text: Its JSON object. Its dtype and shape have been checked.
        shard_sizes: The bytes of each shard of the checkpoint.
        path: The path of the checkpoint, for error messages.

    Returns:
        The tensor. Its chunks are checked when they are used, which may raise CorruptionError.
    """
    return _ListedTensor(
        dtype=text.dtype,
        shape=text.shape,
        chunks=text.chunks,  # type: ignore[arg-type]
        name=name,
        shard_sizes=shard_sizes,
        path=path,
    )


class _ListedTensor(TensorEntry, frozen=True, kw_only=True, eq=False, gc=False):
    """See listed_tensor. The field `chunks` holds the text."""

    name: str
    shard_sizes: Ints
    path: str

    @property  # type: ignore[misc]
    def chunks(self) -> Ints:
        """All chunks; see TensorEntry.

        Raises:
            CorruptionError: The chunks violate the format.
        """
        text = TensorText(self.dtype, self.shape, self._text)
        columns = list(columns_of({self.name: text}, self.path))
        check_chunks(columns, self.shard_sizes, self.path)
        return columns[0].chunks

    @property
    def _text(self) -> msgspec.Raw:
        text: msgspec.Raw = TensorEntry.chunks.__get__(self)  # type: ignore[attr-defined]
        return text

    def identity(self) -> bytes:
        """See TensorEntry. No other tensor has its first chunk."""
        return bytes(memoryview(self._text)[:200])

    def band(self, box: HasBox) -> _Band | None:
        """Find a part of the tensor that includes a box: all elements between two offsets in one
        dimension.

        Returns None if the chunks are not sorted by their offsets, as nearly all are.
        """
        text, dims = memoryview(self._text), len(self.shape)
        commas = np.flatnonzero(np.frombuffer(text, np.uint8) == ord(","))
        marks, width = np.concatenate([[0], commas, [len(text) - 1]]), 3 + 2 * dims
        count, rest = divmod(len(marks) - 1, width)
        if rest or not dims:
            return None

        def number(row: int, column: int) -> int:
            at = row * width + column
            return int(bytes(text[marks[at] + 1 : marks[at + 1]]))

        def offset(row: int) -> int:
            return number(row, 3 + dim)

        try:
            cut = (dim for dim in range(dims) if number(0, 3 + dims + dim) != self.shape[dim])
            dim = next(cut, 0)
            begin, stop = box.offsets[dim], box.offsets[dim] + box.sizes[dim]
            end = bisect_left(range(count), stop, key=offset)
            last = bisect_right(range(count), begin, key=offset) - 1
            if not 0 <= last < end:
                return None
            low, high = offset(last), offset(end - 1) + number(end - 1, 3 + dims + dim)
            first = bisect_left(range(count), low, key=offset)
        except ValueError:  # not a number
            return None
        if not low <= begin < stop <= high <= self.shape[dim]:
            return None
        rows = bytes(text[marks[first * width] + 1 : marks[end * width]])
        return _Band(self, dim, low, high, b"[%b]" % rows)


class _Band(NamedTuple):
    """The elements of a tensor between two offsets in a dimension, and the text of their chunks."""

    entry: _ListedTensor
    dim: int
    low: int
    high: int
    text: bytes


class HasBox(Protocol):
    """A box of a tensor: its offsets and sizes, by dimension."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...


def chunks_of(wanted: Sequence[tuple[TensorEntry, HasBox]]) -> list[Ints]:
    """Return the chunks of boxes of tensors.

    Args:
        wanted: Tensors of one checkpoint with equal ndim, and a box of each that is not empty.

    Returns:
        Rows of `chunks` of each tensor. They include all chunks that share elements with the box,
        and have been checked.

    Raises:
        CorruptionError: The chunks violate the format.
    """
    bands: dict[int, _Band] = {}
    complete: dict[int, Ints] = {}
    if {type(entry) for entry, _ in wanted} != {TensorEntry}:
        boxes = Counter(id(entry) for entry, _ in wanted)
        for number, (entry, box) in enumerate(wanted):
            if boxes[id(entry)] > _MANY_BOXES:
                if id(entry) not in complete:
                    complete[id(entry)] = entry.chunks
            elif isinstance(entry, _ListedTensor) and (band := entry.band(box)) is not None:
                bands[number] = band
    checked = dict(zip(bands, _checked(list(bands.values())), strict=False))
    if len(checked) < len(bands) and len(bands) > 1:  # one is wrong, or two share chunks
        checked = {number: chunks_of([wanted[number]])[0] for number in bands}
    found: list[Ints] = []
    for number, (entry, _) in enumerate(wanted):
        rows = checked.get(number, complete.get(id(entry)))
        found.append(entry.chunks if rows is None else rows)
    return found


def _checked(bands: Sequence[_Band]) -> list[Ints]:
    """Parse and check the chunks of bands. Returns an empty list if they are not valid together.

    Each band is checked as a tensor of its own.
    """
    lists = parse_lists([band.text for band in bands]) if bands else None
    if lists is None:
        return []
    width = 3 + 2 * len(bands[0].entry.shape)
    counts, numbers = lists
    if (counts % width).any():
        return []
    chunks, ends = numbers.reshape(-1, width), np.cumsum(counts // width)
    shapes = np.array([band.entry.shape for band in bands])
    moved = chunks.copy()
    for row, (band, low, high) in enumerate(zip(bands, [0, *ends[:-1]], ends, strict=True)):
        moved[low:high, 3 + band.dim] -= band.low
        shapes[row, band.dim] = band.high - band.low
    entries = [band.entry for band in bands]
    columns = Columns(
        [entry.name for entry in entries],
        np.array([itemsize(entry.dtype) for entry in entries]),
        shapes,
        counts // width,
        moved,
    )
    try:
        check_chunks([columns], entries[0].shard_sizes, entries[0].path)
    except CorruptionError:
        return []
    return np.split(chunks, ends[:-1])


def check_manifest_parts(
    parts: Sequence[Ints], shards: int, manifest: Callable[[], bytes], *, path: str
) -> None:
    """Check that the chunks of several parts do not overlap in their files. Pure.

    Args:
        parts: The ranges of the parts of all ranks.
        shards: The number of shards.
        manifest: Returns the bytes of the manifest.
        path: The path for error messages.

    Raises:
        CorruptionError: Two chunks share bytes.
    """
    if overlap(np.concatenate(parts), shards):
        from_bytes(manifest(), path=path)  # which names them
