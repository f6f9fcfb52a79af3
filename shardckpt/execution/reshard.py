"""Checkpoints written anew offline, by several processes and in bounded memory: as another number
of shards here, in other formats by the converters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import numpy as np
import torch

from shardckpt.coordination.base import Coordinator, exchange
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import StateError
from shardckpt.execution.buffers import BUFFER_BYTES
from shardckpt.execution.save_driver import commit, file_table, new_id
from shardckpt.execution.shard_files import ShardResult, write_rank
from shardckpt.format.dtypes import itemsize
from shardckpt.format.manifest import Manifest
from shardckpt.planning.kinds import MAIN, kind_in
from shardckpt.planning.plan_cache import KnownPlan
from shardckpt.planning.save_plan import GlobalPlan, RankWrites, global_plan
from shardckpt.planning.table import ChunkTable, Ints, LocalPlan, TensorSpec, pad_boxes
from shardckpt.storage.base import Storage, WriteTransaction

__all__ = ["Rewriting", "Source", "even_plan", "read_chunks", "reshard", "rewrite"]


class Source(Protocol):
    """What can be written anew: a checkpoint, of whatever kind."""

    @property
    def path(self) -> str:
        """Where it lies."""

    @property
    def manifest(self) -> Manifest:
        """What is in it. Shards, and the chunks of tensors, may be left out."""

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """A box of a tensor of the manifest, as a contiguous CPU tensor."""

    def close(self) -> None:
        """Close its files."""


def reshard(
    source: Source,
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
    shards. What was saved stays the same, PerRank values and the world size of the save included.
    Takes a few buffers of memory.
    `progress` is called with the bytes that this rank has written so far.
    """
    work = _Reshard(source, path, shards=shards, storage=storage, overwrite=overwrite)
    rewrite(work, coordinator or SingleCoordinator(), progress)


def rewrite(work: Rewriting, ranks: Coordinator, progress: Callable[[int], None]) -> None:
    """Do the work, with all ranks; what it writes appears whole or not at all."""
    try:
        token = exchange(ranks, "begin", lambda: b"", work.begin).decode()
        exchange(ranks, "join", lambda: work.join(token), lambda payloads: b"")
        exchange(ranks, "write", lambda: work.write(ranks, progress), work.commit)
    except BaseException:
        work.abandon()
        raise
    finally:
        work.close()


class Rewriting(Protocol):
    """One rank's part in writing a directory anew. Every rank writes; rank 0 begins and commits."""

    def begin(self, payloads: list[bytes]) -> bytes:
        """On rank 0: make a directory; what the others need to find it."""

    def join(self, token: str) -> bytes:
        """On the others: find it."""

    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """Write this rank's files; what rank 0 needs to know of them."""

    def commit(self, payloads: list[bytes]) -> bytes:
        """On rank 0: write what tells of all files, and make all visible."""

    def abandon(self) -> None:
        """Remove what was written; called while the error that ends the work is handled."""

    def close(self) -> None:
        """Release what is held."""


def even_plan(source: Source, shards: int) -> tuple[LocalPlan, GlobalPlan]:
    """The plan of a rank that holds all of the source, and of `shards` such ranks: the planner
    divides replicas by bytes."""
    if shards < 1:
        raise StateError("A checkpoint has one shard or more", actual=shards)
    tensors = source.manifest.tensors
    specs = tuple(TensorSpec(name, entry.dtype, entry.shape) for name, entry in tensors.items())
    whole = LocalPlan(
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
    return whole, global_plan([whole] * shards)


class _Reshard:
    """See Rewriting."""

    def __init__(
        self, source: Source, path: str, *, shards: int, storage: Storage, overwrite: bool
    ) -> None:
        self.source, self.path, self.shards = source, path, shards
        self.storage, self.overwrite = storage, overwrite
        self.identity = new_id()
        self.transaction: WriteTransaction | None = None
        self.whole, self.plan = even_plan(source, shards)

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
                data=functools.partial(read_chunks, self.source, self.whole.common, chunks),
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


def read_chunks(
    source: Source, specs: tuple[TensorSpec, ...], chunks: ChunkTable, part: slice
) -> Iterator[torch.Tensor]:
    """The elements of some of the chunks, in order, a buffer's worth at a time."""
    tensor, boxes = chunks.tensor[part].tolist(), chunks.boxes[part].tolist()
    for index, box in zip(tensor, boxes, strict=True):
        spec = specs[index]
        dims = len(spec.shape)
        for offsets, sizes in _cut(
            box[0][:dims], box[1][:dims], BUFFER_BYTES // itemsize(spec.dtype)
        ):
            yield source.read_box(spec.name, offsets, sizes)


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
