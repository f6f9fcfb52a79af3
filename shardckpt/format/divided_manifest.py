"""A large manifest that the ranks of a load check together.

A large manifest has long lists of chunks: in each, a chunk for each rank that saved. Each rank
parses and checks some of these lists, for all ranks. Of the others it parses the chunks that it
reads. It checks these as well, so that it never depends on another rank for its own safety. Rank 0
compares the bytes of all chunks, which must not overlap.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

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
from shardckpt.format.number_lists import Ints, NumberText
from shardckpt.format.validation import Columns, check_chunks, joined_ranges, overlap, shard_sizes

__all__ = ["LONG_BYTES", "check_parts", "listed_tensor", "part_from_bytes"]

LONG_BYTES = 16 << 10
"""The text of a long list of chunks, in bytes. Every rank parses shorter lists completely."""
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
        The manifest. If it has a `part`, the manifest is valid once `check_parts` has passed on
        rank 0. It can be used before: the chunks of each tensor are checked when they are used.

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


def _is_long(text: TensorText[msgspec.Raw]) -> bool:
    return len(memoryview(text.chunks)) > LONG_BYTES


def _own(long: list[str], rank: int, world_size: int) -> list[str]:
    """Return the tensors whose chunks this rank checks."""
    checkers = min(world_size, _MOST_CHECKERS)
    return long[rank::checkers] if rank < checkers else []


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

    def chunks_in(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Ints:
        """See TensorEntry.

        Raises:
            CorruptionError: The chunks violate the format.
        """
        try:
            band = self._band(bytes(memoryview(self._text)), offsets, sizes)
        except (CorruptionError, ValueError):
            band = None
        return self.chunks if band is None else band

    def _band(self, text: bytes, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Ints | None:
        """Return the chunks of a part of the tensor that includes a box: all elements between two
        offsets in one dimension.

        Returns None if the chunks are not sorted by their offsets, as nearly all are.
        Raises CorruptionError or ValueError if these chunks are not valid.
        """
        numbers, dims = NumberText(text), len(self.shape)
        marks, width = numbers.marks, 3 + 2 * dims
        count, rest = divmod(len(marks) - 1, width)
        if not dims or rest or not count or (numbers.kinds[1:-1] != ord(",")).any():
            return None

        def number(row: int, column: int) -> int:
            at = row * width + column
            return int(text[marks[at] + 1 : marks[at + 1]])

        cut = (dim for dim in range(dims) if number(0, 3 + dims + dim) != self.shape[dim])
        dim = next(cut, 0)

        def offset(row: int) -> int:
            return number(row, 3 + dim)

        rows = range(count)
        end = bisect_left(rows, offsets[dim] + sizes[dim], key=offset)
        after = bisect_right(rows, offsets[dim], key=offset)
        if not 0 < after <= end:
            return None
        low, high = offset(after - 1), offset(end - 1) + number(end - 1, 3 + dims + dim)
        first = bisect_left(rows, low, key=offset)
        if not low <= offsets[dim] <= offsets[dim] + sizes[dim] <= high <= self.shape[dim]:
            return None
        borders = marks[first * width : end * width + 1]
        flat = numbers.numbers(borders[:-1] + 1, borders[1:])
        if flat is None:
            return None
        chunks = flat.reshape(-1, width)
        shape = np.array([self.shape])
        shape[0, dim] = high - low
        moved = chunks.copy()
        moved[:, 3 + dim] -= low
        items = np.array([itemsize(self.dtype)])
        part = Columns([self.name], items, shape, np.array([len(chunks)]), moved)
        check_chunks([part], self.shard_sizes, self.path)
        return chunks


def check_parts(
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
