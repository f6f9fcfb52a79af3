"""Check the rules of docs/format.md on a manifest whose JSON is well-formed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from shardckpt.errors import CorruptionError
from shardckpt.format.entries import ShardEntry
from shardckpt.format.number_lists import Ints
from shardckpt.format.tiling import first_gap, stable_order

__all__ = [
    "Columns",
    "check_chunks",
    "check_references",
    "joined_ranges",
    "overlap",
    "refuse",
    "shard_sizes",
]

_REFERENCES = {"$tensor", "$ndarray", "$per_rank"}
_NESTED = {dict, list}
_MAX_DEPTH = 300  # in levels of JSON; a dict with other than string keys takes three


def refuse(path: str, expected: object, actual: object, tensor: str | None = None) -> NoReturn:
    """Raise CorruptionError for a manifest."""
    raise CorruptionError(
        "The manifest is corrupted or violates the format",
        path=path,
        tensor=tensor,
        expected=expected,
        actual=actual,
        remedy="load another checkpoint",
    )


class Columns(NamedTuple):
    """t tensors of equal ndim d, with n chunks in all.

    Attributes:
        names: The names [t].
        items: The bytes of one element [t].
        shapes: The global shapes [t, d].
        counts: The number of chunks of each tensor [t].
        chunks: The chunks of all tensors in order, as in TensorEntry [n, 3 + 2 * d].
    """

    names: list[str]
    items: Ints
    shapes: Ints
    counts: Ints
    chunks: Ints


def shard_sizes(shards: Sequence[ShardEntry]) -> Ints:
    """Return the bytes of each shard."""
    return np.array([shard.size_bytes for shard in shards], dtype=np.int64)


def check_chunks(columns: Sequence[Columns], size_bytes: Ints, path: str) -> None:
    """Check that chunks lie within their shards, do not overlap, and tile their tensors.

    `size_bytes` has the bytes of each shard.
    """
    names = [name for group in columns for name in group.names]
    counts = [group.counts for group in columns]
    tensor = np.repeat(np.arange(len(names)), np.concatenate([np.empty(0, np.int64), *counts]))
    ranges = [np.empty((0, 3), np.int64), *(group.chunks[:, :3] for group in columns)]
    shard, begin, end = np.ascontiguousarray(np.concatenate(ranges).T)

    def forbid(wrong: NDArray[np.bool_], expected: str) -> None:
        if wrong.any():
            index = int(wrong.argmax())
            actual = f"shard {shard[index]}, bytes {begin[index]} to {end[index]}"
            refuse(path, expected, actual, names[int(tensor[index])])

    count = len(size_bytes)
    forbid((shard < 0) | (shard >= count), f"a shard from 0 to {count - 1}")
    forbid((begin < 8) | (end < begin) | (end > size_bytes[shard]), "bytes within the shard")
    items = np.concatenate([np.empty(0, np.int64), *(group.items for group in columns)])
    forbid(begin % items[tensor] != 0, "a chunk aligned to its element size")
    forbid(_overlaps(shard, begin, end, count), "chunks that don't overlap in the file")
    for group in columns:
        _check_boxes(group, path)


def _overlaps(shard: Ints, begin: Ints, end: Ints, shards: int) -> NDArray[np.bool_]:
    """Return a mask of the chunks that begin before the previous chunk of their shard ends."""
    order = _by_position(shard, begin, end, shards)
    over = np.zeros(len(order), dtype=bool)
    same = shard[order][1:] == shard[order][:-1]
    over[order[1:]] = same & (begin[order][1:] < end[order][:-1])
    return over


def _by_position(shard: Ints, begin: Ints, end: Ints, shards: int) -> Ints:
    """Return the order of ranges of bytes by shard, begin and end."""
    order = stable_order(shard, below=shards)
    # Chunks are usually in the order of the file.
    same = shard[order][1:] == shard[order][:-1]
    if (same & (begin[order][1:] <= begin[order][:-1])).any():
        order = np.lexsort((end, begin, shard))
    return order


def joined_ranges(ranges: Ints, shards: int) -> Ints:
    """Join ranges of bytes where one begins at the end of another.

    Args:
        ranges: (shard, begin, end) of each [n, 3]. They do not overlap.
        shards: The number of shards.

    Returns:
        The joined ranges [m, 3], by shard and begin.
    """
    shard, begin, end = ranges.T
    shard, begin, end = ranges[_by_position(shard, begin, end, shards)].T
    new = np.ones(len(ranges), dtype=bool)
    new[1:] = (shard[1:] != shard[:-1]) | (begin[1:] != end[:-1])
    last = np.roll(new, -1)
    return np.column_stack([shard[new], begin[new], end[last]])


def overlap(ranges: Ints, shards: int) -> bool:
    """Whether two of the ranges of bytes (shard, begin, end) [n, 3] overlap."""
    shard, begin, end = ranges.T
    return bool(_overlaps(shard, begin, end, shards).any())


def _check_boxes(group: Columns, path: str) -> None:
    """Check that boxes tile their tensors, and that chunks have the bytes of their boxes."""
    names, items, shapes, counts, chunks = group
    offsets, sizes = chunks[:, 3 : 3 + shapes.shape[1]], chunks[:, 3 + shapes.shape[1] :]
    gap = first_gap(shapes, np.cumsum(np.append(0, counts)), offsets, sizes)
    if gap is not None:
        index, (problem, at, extent) = gap
        actual = f"{problem} at offsets {list(at)}, sizes {list(extent)}"
        expected = f"chunks that tile the shape {shapes[index].tolist()}"
        refuse(path, expected, actual, names[index])
    volumes = np.repeat(items, counts)
    for column in sizes.T:  # many times as fast as prod(axis=1)
        volumes *= column
    wrong = chunks[:, 2] - chunks[:, 1] != volumes
    if wrong.any():
        index = int(wrong.argmax())
        name = names[int(np.repeat(np.arange(len(names)), counts)[index])]
        size = int(chunks[index, 2] - chunks[index, 1])
        refuse(path, f"{int(volumes[index])} bytes in a chunk", f"{size} bytes", name)


def check_references(state: Any, per_rank: list[Any], tensors: Collection[str], path: str) -> None:
    """Check that references in the typed JSON have targets, and that nesting is limited."""
    lists = all(type(values) is list for values in per_rank)
    in_each_rank = set(map(str, range(min(map(len, per_rank), default=0) if lists else 0)))
    level: list[Any] = [node for node in (state, per_rank) if type(node) in _NESTED]
    depth = 0
    while level:
        inner: list[Any] = []
        for node in level:
            if type(node) is list:
                inner += [item for item in node if type(item) in _NESTED]
                continue
            for key, item in node.items():
                if type(item) is dict and len(item) == 1:
                    target = item.get("$tensor")
                    if type(target) is str and target in tensors:
                        continue  # a valid reference, as most items are
                if key in _REFERENCES:
                    targets = in_each_rank if key == "$per_rank" else tensors
                    if type(item) is not str or item not in targets:
                        actual = f"{key} {item!r}"[:200]
                        refuse(path, "references to tensors of the manifest", actual)
                elif type(item) in _NESTED:
                    inner.append(item)
        depth += 1
        if depth > _MAX_DEPTH:
            refuse(path, f"at most {_MAX_DEPTH} levels of nesting", "more")
        level = inner
