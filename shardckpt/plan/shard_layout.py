"""The layout of shards: file names, chunk sizes, and the entries of tensors in the manifest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardckpt.format.dtype_names import itemsize
from shardckpt.format.entries import TensorEntry
from shardckpt.format.tiling import stable_order
from shardckpt.plan.local_plan import ChunkTable, Ints, TensorSpec, widen_boxes
from shardckpt.state.file_groups import MAIN, file_suffix

__all__ = ["chunk_bytes", "shard_name", "tensor_entries"]


def shard_name(*, rank: int, world_size: int, file_group: int = MAIN) -> str:
    """Return the name of the file with a rank's chunks of a file group."""
    return f"shard-{rank:05d}-of-{world_size:05d}{file_suffix(file_group)}.safetensors"


def chunk_bytes(specs: Sequence[TensorSpec], chunks: ChunkTable) -> Ints:
    """Return the size of each chunk in bytes [n]."""
    items = np.array([itemsize(spec.dtype) for spec in specs], dtype=np.int64)
    size_bytes: Ints = items[chunks.tensor]
    for sizes in chunks.boxes[:, 1].T:  # many times as fast as prod(axis=1)
        size_bytes *= sizes
    return size_bytes


def tensor_entries(
    specs: Sequence[TensorSpec], chunks: ChunkTable, *, bounds: Ints, header_bytes: Ints
) -> dict[str, TensorEntry]:
    """Return the entries of tensors in the manifest, with the position of each chunk.

    Rows bounds[s] to bounds[s + 1] of `chunks` are those of shard s, in the order of the file,
    after a header of header_bytes[s] bytes. The chunks of a tensor are sorted by offsets.
    """
    dims = max([chunks.boxes.shape[2], *(len(spec.shape) for spec in specs)])
    tensor, boxes = chunks.tensor, widen_boxes(chunks.boxes, dims=dims)
    sizes = chunk_bytes(specs, chunks)
    shard = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    total = np.concatenate([[0], np.cumsum(sizes)])
    end = total[1:] + (header_bytes - total[bounds[:-1]])[shard]
    order = _by_offsets(tensor, boxes, len(specs))
    flat = np.empty((len(tensor), 3 + 2 * dims), dtype=np.int64)
    columns = [shard, end - sizes, end, *boxes[:, 0].T, *boxes[:, 1].T]
    for index, column in enumerate(columns):
        flat[:, index] = column
    flat = flat[order]
    rows = np.searchsorted(tensor[order], np.arange(len(specs) + 1)).tolist()
    used = [np.array([*range(3 + n), *range(3 + dims, 3 + dims + n)]) for n in range(dims)]
    return {
        spec.name: TensorEntry(
            dtype=spec.dtype,
            shape=tuple(spec.shape),
            chunks=flat[low:high]
            if len(spec.shape) == dims
            else flat[low:high][:, used[len(spec.shape)]],
        )
        for spec, low, high in zip(specs, rows[:-1], rows[1:], strict=True)
    }


def _by_offsets(tensor: Ints, boxes: Ints, count: int) -> Ints:
    """Return the order of chunks by tensor and offsets. They are usually sorted already."""
    order = stable_order(tensor, below=count)
    sorted_so_far = np.diff(tensor[order]) > 0
    for offsets in boxes[:, 0].T:
        step = np.diff(offsets[order])
        if not (sorted_so_far | (step >= 0)).all():
            return np.lexsort((*boxes[:, 0, ::-1].T, tensor)).astype(np.int64)
        sorted_so_far |= step > 0
    return order
