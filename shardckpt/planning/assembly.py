"""From what the ranks have written to the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardckpt.format.dtypes import itemsize
from shardckpt.format.manifest import TensorEntry
from shardckpt.planning.kinds import MAIN, file_suffix
from shardckpt.planning.table import Ints, TensorSpec, widen_boxes

__all__ = ["WrittenShard", "chunk_bytes", "shard_name", "tensor_entries"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenShard:
    """The chunks of one file in file order: `tensor` [m] indexes the specs, `boxes` [m, 2, D];
    data begin at byte `header_bytes` of the file."""

    tensor: Ints
    boxes: Ints
    header_bytes: int


def shard_name(*, rank: int, world_size: int, kind: int = MAIN) -> str:
    """The name of the file that holds a rank's chunks of a kind."""
    return f"shard-{rank:05d}-of-{world_size:05d}{file_suffix(kind)}.safetensors"


def chunk_bytes(specs: Sequence[TensorSpec], tensor: Ints, boxes: Ints) -> Ints:
    """The size in bytes of each chunk [m]."""
    items = np.array([itemsize(spec.dtype) for spec in specs], dtype=np.int64)
    size_bytes: Ints = boxes[:, 1].prod(axis=1) * items[tensor]
    return size_bytes


def tensor_entries(
    specs: Sequence[TensorSpec], shards: Sequence[WrittenShard]
) -> dict[str, TensorEntry]:
    """The manifest's tensors: where each chunk of each lies. Chunks are sorted by their offsets."""
    ends = [
        shard.header_bytes + np.cumsum(chunk_bytes(specs, shard.tensor, shard.boxes))
        for shard in shards
    ]
    dims = max((shard.boxes.shape[2] for shard in shards), default=0)
    tensor = np.concatenate([shard.tensor for shard in shards])
    end = np.concatenate(ends)
    boxes = np.concatenate([widen_boxes(shard.boxes, dims=dims) for shard in shards])
    begin = end - chunk_bytes(specs, tensor, boxes)
    index = np.repeat(np.arange(len(shards)), [len(shard.tensor) for shard in shards])
    order = np.lexsort((*(boxes[:, 0, dim] for dim in reversed(range(dims))), tensor))
    flat = np.column_stack([index, begin, end, boxes[:, 0], boxes[:, 1]])[order]
    bounds = np.searchsorted(tensor[order], np.arange(len(specs) + 1)).tolist()
    columns = [
        np.array([*range(3 + n), *range(3 + dims, 3 + dims + n)], dtype=np.intp)
        for n in range(dims + 1)
    ]
    return {
        spec.name: TensorEntry(
            dtype=spec.dtype,
            shape=tuple(spec.shape),
            chunks=flat[low:high][:, columns[len(spec.shape)]],
        )
        for spec, low, high in zip(specs, bounds[:-1], bounds[1:], strict=True)
    }
