"""A checkpoint written anew as another number of shards, offline and in bounded memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import torch

from shardckpt.checkpoint import Checkpoint
from shardckpt.coordination.base import Coordinator, exchange
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import StateError
from shardckpt.execution.buffers import BUFFER_BYTES
from shardckpt.execution.save_driver import commit, file_table, new_id
from shardckpt.execution.shard_files import ShardResult, write_rank
from shardckpt.format.manifest import Manifest, TensorEntry
from shardckpt.planning.kinds import MAIN, kind_in
from shardckpt.planning.plan_cache import KnownPlan
from shardckpt.planning.save_plan import RankWrites, global_plan
from shardckpt.planning.table import ChunkTable, Ints, LocalPlan, TensorSpec, pad_boxes
from shardckpt.storage.base import Storage, WriteTransaction

__all__ = ["reshard"]


def reshard(
    source: Checkpoint,
    path: str,
    *,
    shards: int,
    storage: Storage,
    overwrite: bool = False,
    coordinator: Coordinator | None = None,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> None:
    """Write all of `source` to `path` as `shards` shards of even size.

    Collective over the coordinator's ranks, by default this process alone: each writes whole
    shards. What was saved stays the same,
    PerRank values and the world size of the save included. Takes a few buffers of memory.
    `progress` is called with the bytes that this rank has written so far.
    """
    if shards < 1:
        raise StateError("A checkpoint has one shard or more", actual=shards)
    ranks = coordinator or SingleCoordinator()
    work = _Reshard(source, path, shards=shards, storage=storage, overwrite=overwrite)
    try:
        token = exchange(ranks, "begin", lambda: b"", work.begin).decode()
        exchange(ranks, "join", lambda: work.join(token), lambda payloads: b"")
        exchange(ranks, "write", lambda: work.write(ranks, progress), work.commit)
    except BaseException:
        work.abandon()
        raise
    finally:
        work.close()


class _Reshard:
    """One rank's part of a reshard."""

    def __init__(
        self, source: Checkpoint, path: str, *, shards: int, storage: Storage, overwrite: bool
    ) -> None:
        self.source, self.path, self.shards = source, path, shards
        self.storage, self.overwrite = storage, overwrite
        self.identity = new_id()
        self.transaction: WriteTransaction | None = None
        tensors = source.manifest.tensors
        specs = tuple(TensorSpec(n, entry.dtype, entry.shape) for n, entry in tensors.items())
        self.whole = LocalPlan(
            common=specs,
            own=(),
            kind=_kinds(source.manifest),
            chunks=ChunkTable(
                tensor=np.arange(len(specs)),
                boxes=pad_boxes([((0,) * len(spec.shape), spec.shape) for spec in specs]),
            ),
            shared=np.ones(len(specs), dtype=np.bool_),
            tree=b"",
            own_trees=b"",
        )
        # As if every rank held everything: the planner divides replicas by bytes.
        self.plan = global_plan([self.whole] * shards)

    def begin(self, payloads: list[bytes]) -> bytes:
        self.transaction = self.storage.begin(
            self.path, checkpoint_id=self.identity, overwrite=self.overwrite
        )
        return self.transaction.token.encode()

    def join(self, token: str) -> bytes:
        if self.transaction is None:
            self.transaction = self.storage.join(self.path, token=token)
        return b""

    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """The shards of this rank, in turn with the others: all are of even size."""
        assert self.transaction is not None
        results: list[ShardResult] = []
        for shard in range(ranks.rank, self.shards, ranks.world_size):
            writes = RankWrites.of(self.whole, self.plan.shares[shard])
            tensor = self.whole.chunks.tensor[writes.row]
            chunks = ChunkTable(tensor=tensor, boxes=writes.boxes)
            before = sum(result.size_bytes for result in results)

            def written(size_bytes: int, before: int = before) -> None:
                ranks.progress(size_bytes)
                progress(before + size_bytes)

            result = write_rank(
                self.transaction,
                rank=shard,
                world_size=self.shards,
                specs=self.whole.common,
                chunks=chunks,
                files=writes.files,
                data=functools.partial(_parts, self.source, self.whole.common, chunks),
                progress=written,
            )
            results.append(result)
        return msgspec.msgpack.encode(results)

    def commit(self, payloads: list[bytes]) -> bytes:
        assert self.transaction is not None
        by_rank = [msgspec.msgpack.decode(own, type=list[ShardResult]) for own in payloads]
        count = len(by_rank)
        results = [by_rank[shard % count][shard // count] for shard in range(self.shards)]
        return commit(
            self.transaction,
            checkpoint_id=self.identity,
            tensors=KnownPlan(self.plan).encoded_tensors(file_table(results)),
            results=results,
            tree=msgspec.json.encode(self.source.manifest.state),
            saved_by=self.source.manifest,
        )

    def abandon(self) -> None:
        if self.transaction is not None:
            self.transaction.abandon()

    def close(self) -> None:
        if self.transaction is not None:
            self.transaction.close()


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
