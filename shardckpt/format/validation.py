"""What must be true of a manifest whose JSON is well-formed; docs/format.md has the rules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from shardckpt.errors import CorruptionError
from shardckpt.format.entries import ShardEntry
from shardckpt.format.tiling import first_gap, stable_order

__all__ = ["Columns", "check_chunks", "check_references", "refuse"]

Ints = NDArray[np.int64]
_REFERENCES = {"$tensor", "$ndarray", "$per_rank"}
_NESTED = {dict, list}
_MAX_DEPTH = 300  # of typed JSON: a dict with odd keys has three levels


def refuse(path: str, expected: object, actual: object, tensor: str | None = None) -> NoReturn:
    """Raise CorruptionError for a manifest."""
    raise CorruptionError(
        "The manifest is damaged, or breaks a rule of the format",
        path=path,
        tensor=tensor,
        expected=expected,
        actual=actual,
        remedy="load another checkpoint",
    )


class Columns(NamedTuple):
    """Tensors of equal ndim d: their names, the bytes of an element of each [t], shapes [t, d],
    how many chunks each has [t], and all of these in turn [n, 3 + 2 * d], as in a TensorEntry."""

    names: list[str]
    items: Ints
    shapes: Ints
    counts: Ints
    chunks: Ints


def check_chunks(columns: Sequence[Columns], shards: tuple[ShardEntry, ...], path: str) -> None:
    """Every chunk in its shard, of the size that its box has, over no other; boxes tile tensors."""
    names = [name for own in columns for name in own.names]
    counts = [own.counts for own in columns]
    owner = np.repeat(np.arange(len(names)), np.concatenate([np.empty(0, np.int64), *counts]))
    places = [np.empty((0, 3), np.int64), *(own.chunks[:, :3] for own in columns)]
    shard, begin, end = np.ascontiguousarray(np.concatenate(places).T)

    def forbid(wrong: NDArray[np.bool_], expected: str) -> None:
        if wrong.any():
            index = int(wrong.argmax())
            actual = f"shard {shard[index]}, bytes {begin[index]} to {end[index]}"
            refuse(path, expected, actual, names[int(owner[index])])

    size_bytes = np.array([shard.size_bytes for shard in shards], dtype=np.int64)
    forbid((shard < 0) | (shard >= len(shards)), f"a shard from 0 to {len(shards) - 1}")
    forbid((begin < 8) | (end < begin) | (end > size_bytes[shard]), "bytes within the shard")
    items = np.concatenate([np.empty(0, np.int64), *(own.items for own in columns)])
    forbid(begin % items[owner] != 0, "a chunk aligned to its element size")
    forbid(_overlaps(shard, begin, end, len(shards)), "chunks that don't overlap in the file")
    for own in columns:
        _check_boxes(own, path)


def _overlaps(shard: Ints, begin: Ints, end: Ints, shards: int) -> NDArray[np.bool_]:
    """Which chunks begin before another one of the same shard, that begins no later, has ended."""
    order = stable_order(shard, below=shards)
    same = shard[order][1:] == shard[order][:-1]
    if (same & (begin[order][1:] <= begin[order][:-1])).any():  # mostly they stand in file order
        order = np.lexsort((end, begin, shard))
        same = shard[order][1:] == shard[order][:-1]
    over = np.zeros(len(order), dtype=bool)
    over[order[1:]] = same & (begin[order][1:] < end[order][:-1])
    return over


def _check_boxes(own: Columns, path: str) -> None:
    """The boxes of tensors tile them, and have the sizes of their bytes."""
    names, items, shapes, counts, chunks = own
    offsets, sizes = chunks[:, 3 : 3 + shapes.shape[1]], chunks[:, 3 + shapes.shape[1] :]
    found = first_gap(shapes, np.cumsum(np.append(0, counts)), offsets, sizes)
    if found is not None:
        index, (kind, at, extent) = found
        actual = f"{kind} at offsets {list(at)}, sizes {list(extent)}"
        expected = f"chunks that make up shape {shapes[index].tolist()}"
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
    """Every reference in the typed JSON has its target, and nothing is nested too deeply."""
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
                if key in _REFERENCES:
                    targets = in_each_rank if key == "$per_rank" else tensors
                    if type(item) is not str or item not in targets:
                        found = f"{key} {item!r}"[:200]
                        refuse(path, "values that refer to tensors of the manifest", found)
                elif type(item) in _NESTED:
                    inner.append(item)
        depth += 1
        if depth > _MAX_DEPTH:
            refuse(path, f"at most {_MAX_DEPTH} levels of nesting", "more")
        level = inner
