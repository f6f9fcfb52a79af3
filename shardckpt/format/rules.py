"""What must be true of a manifest whose JSON is well-formed; docs/format.md has the rules."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from shardckpt.errors import CorruptionError
from shardckpt.format.boxes import first_gap, stable_order
from shardckpt.format.dtypes import itemsize

if TYPE_CHECKING:
    from shardckpt.format.manifest import ShardEntry, TensorEntry

__all__ = ["check_chunks", "check_references", "refuse"]

Ints = NDArray[np.int64]
_REFERENCES = {"$tensor", "$ndarray", "$per_rank"}
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


def check_chunks(
    tensors: dict[str, TensorEntry], shards: tuple[ShardEntry, ...], path: str
) -> None:
    """Every chunk in its shard, of the size that its box has, over no other; boxes tile tensors."""
    names = list(tensors)
    counts = [len(entry.chunks) for entry in tensors.values()]
    owner = np.repeat(np.arange(len(names)), counts)
    places = [entry.chunks[:, :3] for entry in tensors.values()]
    place = np.concatenate(places) if places else np.empty((0, 3), np.int64)
    size_bytes = np.array([shard.size_bytes for shard in shards], dtype=np.int64)

    def forbid(wrong: NDArray[np.bool_], expected: str) -> None:
        if wrong.any():
            index = int(wrong.argmax())
            shard, begin, end = place[index].tolist()
            actual = f"shard {shard}, bytes {begin} to {end}"
            refuse(path, expected, actual, names[int(owner[index])])

    shard, begin, end = np.ascontiguousarray(place.T)
    forbid((shard < 0) | (shard >= len(shards)), f"a shard from 0 to {len(shards) - 1}")
    forbid((begin < 8) | (end < begin) | (end > size_bytes[shard]), "bytes within the shard")
    items = np.array([itemsize(entry.dtype) for entry in tensors.values()], dtype=np.int64)
    forbid(begin % items[owner] != 0, "a chunk aligned to its element size")
    forbid(_overlaps(shard, begin, end, len(shards)), "chunks that don't overlap in the file")
    by_dims: dict[int, list[str]] = {}
    for name, entry in tensors.items():
        by_dims.setdefault(len(entry.shape), []).append(name)
    for own in by_dims.values():
        _check_boxes({name: tensors[name] for name in own}, path)


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


def _check_boxes(tensors: dict[str, TensorEntry], path: str) -> None:
    """The boxes of tensors of equal ndim tile them, and have the sizes of their bytes."""
    names, entries = list(tensors), list(tensors.values())
    dims = len(entries[0].shape)
    shapes = np.array([entry.shape for entry in entries], dtype=np.int64)
    shapes = shapes.reshape(len(entries), dims)
    counts = [len(entry.chunks) for entry in entries]
    chunks = np.concatenate([entry.chunks for entry in entries])
    found = first_gap(
        shapes, np.cumsum([0, *counts]), chunks[:, 3 : 3 + dims], chunks[:, 3 + dims :]
    )
    if found is not None:
        index, (kind, at, extent) = found
        actual = f"{kind} at offsets {list(at)}, sizes {list(extent)}"
        expected = f"chunks that make up shape {shapes[index].tolist()}"
        refuse(path, expected, actual, names[index])
    items = np.repeat([itemsize(entry.dtype) for entry in entries], counts)
    volumes = chunks[:, 3 + dims :].prod(axis=1) * items
    wrong = chunks[:, 2] - chunks[:, 1] != volumes
    if wrong.any():
        index = int(wrong.argmax())
        name = names[int(np.repeat(np.arange(len(names)), counts)[index])]
        size = int(chunks[index, 2] - chunks[index, 1])
        refuse(path, f"{int(volumes[index])} bytes in a chunk", f"{size} bytes", name)


def check_references(state: Any, per_rank: list[Any], tensors: Collection[str], path: str) -> None:
    """Every reference in the typed JSON has its target, and nothing is nested too deeply."""
    level: list[Any] = [state, per_rank]
    depth = 0
    while level:
        nodes = [node for node in level if isinstance(node, dict)]
        for tag, body in ((tag, node[tag]) for node in nodes for tag in node.keys() & _REFERENCES):
            if not isinstance(body, str) or not (
                _in_each_rank(per_rank, body) if tag == "$per_rank" else body in tensors
            ):
                found = f"{tag} {body!r}"[:200]
                refuse(path, "values that refer to tensors of the manifest", found)
        depth += 1
        if depth > _MAX_DEPTH:
            refuse(path, f"at most {_MAX_DEPTH} levels of nesting", "more")
        inner = [item for node in nodes for item in node.values()]
        inner += [item for node in level if isinstance(node, list) for item in node]
        level = [item for item in inner if isinstance(item, (dict, list))]


def _in_each_rank(per_rank: list[Any], index: str) -> bool:
    return bool(per_rank) and all(
        isinstance(values, list) and index in map(str, range(len(values))) for values in per_rank
    )
