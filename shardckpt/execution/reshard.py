"""A checkpoint written anew as another number of shards, offline and in bounded memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import torch

from shardckpt.checkpoint import Checkpoint
from shardckpt.errors import StateError
from shardckpt.execution.buffers import BUFFER_BYTES
from shardckpt.execution.save_driver import commit, file_table, new_id
from shardckpt.execution.shard_files import write_rank
from shardckpt.format.manifest import Manifest, TensorEntry
from shardckpt.planning.kinds import MAIN, kind_in
from shardckpt.planning.plan_cache import KnownPlan
from shardckpt.planning.save_plan import RankWrites, global_plan
from shardckpt.planning.table import ChunkTable, Ints, LocalPlan, TensorSpec, pad_boxes
from shardckpt.storage.base import Storage

__all__ = ["reshard"]


def reshard(
    source: Checkpoint,
    path: str,
    *,
    shards: int,
    storage: Storage,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> None:
    """Write all of `source` to `path` as `shards` shards of even size; one process.

    What was saved stays the same, PerRank values and the world size of the save included.
    Takes a few buffers of memory. `progress` is called with the bytes written so far.
    """
    if shards < 1:
        raise StateError("A checkpoint has one shard or more", actual=shards)
    manifest = source.manifest
    specs = tuple(TensorSpec(n, entry.dtype, entry.shape) for n, entry in manifest.tensors.items())
    whole = LocalPlan(
        common=specs,
        own=(),
        kind=_kinds(manifest),
        chunks=ChunkTable(
            tensor=np.arange(len(specs)),
            boxes=pad_boxes([((0,) * len(spec.shape), spec.shape) for spec in specs]),
        ),
        shared=np.ones(len(specs), dtype=np.bool_),
        tree=b"",
        own_trees=b"",
    )
    # As if every rank held everything: the planner divides replicas by bytes.
    plan = global_plan([whole] * shards)
    identity = new_id()
    transaction = storage.begin(path, checkpoint_id=identity, overwrite=overwrite)
    try:
        results = []
        before = 0
        for rank in range(shards):
            writes = RankWrites.of(whole, plan.shares[rank])
            chunks = ChunkTable(tensor=whole.chunks.tensor[writes.row], boxes=writes.boxes)
            result = write_rank(
                transaction,
                rank=rank,
                world_size=shards,
                specs=specs,
                chunks=chunks,
                files=writes.files,
                data=functools.partial(_parts, source, specs, chunks),
                progress=lambda written, before=before: progress(before + written),  # type: ignore[misc]
            )
            before += result.size_bytes
            results.append(result)
        commit(
            transaction,
            checkpoint_id=identity,
            tensors=KnownPlan(plan).encoded_tensors(file_table(results)),
            results=results,
            tree=msgspec.json.encode(manifest.state),
            saved_by=manifest,
        )
    except BaseException:
        transaction.abandon()
        raise


def _kinds(manifest: Manifest) -> Ints:
    """The kind of each tensor: that of the file which holds its first chunk."""
    kinds = [kind_in(shard.name) for shard in manifest.shards]
    return np.array(
        [kinds[e.chunks[0, 0]] if len(e.chunks) else MAIN for e in manifest.tensors.values()],
        dtype=np.int64,
    )


def _parts(
    source: Checkpoint, specs: tuple[TensorSpec, ...], chunks: ChunkTable, part: slice
) -> Iterator[torch.Tensor]:
    """The elements of some of the chunks, in order, a buffer's worth at a time."""
    tensor, boxes = chunks.tensor[part].tolist(), chunks.boxes[part].tolist()
    for index, box in zip(tensor, boxes, strict=True):
        spec = specs[index]
        dims = len(spec.shape)
        entry = source.manifest.tensors[spec.name]
        for offsets, sizes in _cut(box[0][:dims], box[1][:dims], _elements(entry)):
            yield source.read_box(entry, offsets, sizes)


def _elements(entry: TensorEntry) -> int:
    return BUFFER_BYTES * max(math.prod(entry.shape), 1) // max(entry.size_bytes, 1) or 1


def _cut(
    offsets: list[int], sizes: list[int], most: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A box in row-major pieces of at most `most` elements."""
    if math.prod(sizes) <= most:
        yield tuple(offsets), tuple(sizes)
        return
    dim = next(index for index, size in enumerate(sizes) if size > 1)
    step = max(1, most // math.prod(sizes[dim + 1 :]))
    for at in range(0, sizes[dim], step):
        low, size = offsets.copy(), sizes.copy()
        low[dim], size[dim] = offsets[dim] + at, min(step, sizes[dim] - at)
        yield from _cut(low, size, most)
