"""The layout of shards: file names, chunk sizes, and the entries of tensors in the manifest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest

from shardckpt.format.dtype_names import itemsize
from shardckpt.format.entries import TensorEntry
from shardckpt.format.number_lists import Ints
from shardckpt.format.tiling import stable_order
from shardckpt.plan.local_plan import ChunkTable, TensorSpec, flat_boxes, widen_boxes
from shardckpt.state.file_groups import MAIN, file_suffix

__all__ = [
    "FileLayout",
    "chunk_bytes",
    "item_sizes",
    "layout_digests",
    "shard_name",
    "tensor_blocks",
    "tensor_entries",
]

_BLOCK_CHUNKS = 1 << 16


class FileLayout(NamedTuple):
    """The header of a file, its size in bytes, and the digest of its chunks (layout_digests)."""

    header: bytes
    size_bytes: int
    digest: int


def shard_name(*, rank: int, world_size: int, file_group: int = MAIN) -> str:
    """Return the name of the file with a rank's chunks of a file group."""
    return f"shard-{rank:05d}-of-{world_size:05d}{file_suffix(file_group)}.safetensors"


def item_sizes(specs: Sequence[TensorSpec]) -> Ints:
    """Return the size of an element of each tensor in bytes [t]."""
    dtypes = [spec.dtype for spec in specs]
    widths = {dtype: itemsize(dtype) for dtype in set(dtypes)}
    return np.array([widths[dtype] for dtype in dtypes], dtype=np.int64)


def chunk_bytes(specs: Sequence[TensorSpec], chunks: ChunkTable) -> Ints:
    """Return the size of each chunk in bytes [n]."""
    size_bytes: Ints = item_sizes(specs)[chunks.tensor]
    for sizes in chunks.boxes[:, 1].T:  # many times as fast as prod(axis=1)
        size_bytes *= sizes
    return size_bytes


def layout_digests(
    specs: Sequence[TensorSpec], chunks: ChunkTable, bounds: Sequence[int]
) -> list[int]:
    """Return a digest of each file: of the tensors and boxes of its chunks, in order.

    Rows bounds[s] to bounds[s + 1] of `chunks` are those of file s. Neither the numbers of tensors
    nor unused dimensions count, as they differ between a rank and rank 0.
    """
    known: dict[bytes, tuple[int, int]] = {}  # most files have chunks of the same tensors
    digests = []
    for low, high in itertools.pairwise(bounds):
        numbers = chunks.tensor[low:high]
        key = numbers.tobytes()
        if key not in known:
            tensors = [specs[number] for number in numbers.tolist()]
            dims = max([len(spec.shape) for spec in tensors], default=0)
            known[key] = dims, xxh3_64_intdigest(msgspec.msgpack.encode(tensors))
        dims, seed = known[key]
        boxes = np.ascontiguousarray(chunks.boxes[low:high, :, :dims])
        digests.append(xxh3_64_intdigest(boxes.data, seed) >> 1)  # an int64
    return digests


def tensor_entries(
    specs: Sequence[TensorSpec], chunks: ChunkTable, *, bounds: Ints, header_bytes: Ints
) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the name and the entry of each tensor in the manifest, with the position of each chunk.

    Rows bounds[s] to bounds[s + 1] of `chunks` are those of shard s, in the order of the file,
    after a header of header_bytes[s] bytes. The chunks of a tensor are sorted by offsets.
    """
    dims = max([chunks.boxes.shape[2], *(len(spec.shape) for spec in specs)])
    sizes = chunk_bytes(specs, chunks)
    shard = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    total = np.concatenate([[0], np.cumsum(sizes)])
    end = total[1:] + (header_bytes - total[bounds[:-1]])[shard]
    used = [np.array([*range(3 + n), *range(3 + dims, 3 + dims + n)]) for n in range(dims + 1)]
    for block, rows, ends in tensor_blocks(chunks.tensor, len(specs)):
        boxes = widen_boxes(chunks.boxes.take(rows, axis=0), dims=dims)
        number = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        if (order := _by_offsets(number, boxes)) is not None:
            rows, boxes = rows[order], boxes.take(order, axis=0)
        flat = np.empty((len(rows), 3 + 2 * dims), dtype=np.int64)
        flat[:, 0], flat[:, 2] = shard[rows], end[rows]
        flat[:, 1] = flat[:, 2] - sizes[rows]
        flat[:, 3:] = flat_boxes(boxes)
        for spec, low, high in zip(specs[block], [0, *ends[:-1]], ends, strict=True):
            part = flat[low:high]
            if len(spec.shape) < dims:
                part = part[:, used[len(spec.shape)]]
            yield spec.name, TensorEntry(dtype=spec.dtype, shape=tuple(spec.shape), chunks=part)


def tensor_blocks(tensor: Ints, count: int) -> Iterator[tuple[slice, Ints, list[int]]]:
    """Divide chunks into blocks of consecutive tensors, which fit in the cache of a processor.

    Args:
        tensor: The tensor of each chunk [n].
        count: The number of tensors.

    Yields:
        The tensors of a block, their chunks by tensor, and where the chunks of each tensor end.
    """
    order = stable_order(tensor, below=count)
    ends = np.cumsum(np.bincount(tensor, minlength=count))
    cuts = np.flatnonzero(np.diff(ends // _BLOCK_CHUNKS, prepend=0)) + 1
    borders = [0, *cuts[cuts < count].tolist(), count] if count else []
    for low, high in itertools.pairwise(borders):
        begin = int(ends[low - 1]) if low else 0
        yield slice(low, high), order[begin : ends[high - 1]], (ends[low:high] - begin).tolist()


def _by_offsets(tensor: Ints, boxes: Ints) -> Ints | None:
    """Return the order of chunks by tensor and offsets. They are sorted by tensor. None if they are
    sorted by offsets too, as usual."""
    sorted_so_far = np.diff(tensor) > 0
    for offsets in boxes[:, 0].T:
        step = np.diff(offsets)
        if not (sorted_so_far | (step >= 0)).all():
            return np.lexsort((*boxes[:, 0, ::-1].T, tensor)).astype(np.int64)
        sorted_so_far |= step > 0
    return None
