"""Rewrite checkpoints offline, by several processes and in bounded memory. `reshard` writes another
number of shards; converters write other formats."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import StateError
from shardckpt.format.entries import Manifest
from shardckpt.format.number_lists import Ints
from shardckpt.maintenance.parallel_write import NewFile, joined_files, write_ranges
from shardckpt.maintenance.rewritable import Source
from shardckpt.plan.local_plan import ChunkTable, LocalPlan, TensorSpec, pad_boxes
from shardckpt.plan.plan_cache import KnownPlan
from shardckpt.plan.save_plan import GlobalPlan, RankWrites, global_plan
from shardckpt.plan.shard_layout import chunk_bytes, shard_name
from shardckpt.saving.agreement import new_id
from shardckpt.saving.commit import commit_manifest, file_table
from shardckpt.saving.rank_writer import ShardFile, ShardResult, layout
from shardckpt.state.file_groups import MAIN, group_in_name
from shardckpt.storage.base import Storage, WriteTransaction

__all__ = ["Rewriting", "even_plan", "reshard", "rewrite"]

_MOST_SHARDS = 1 << 16  # more files than any job has ranks


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
    """Write all entries of `source` to `path` as `shards` shards of even size; see
    `shardckpt.reshard`.

    Collective over the ranks of `coordinator`, by default this process alone. Each rank writes the
    same number of bytes. `progress` is called with the bytes that this rank wrote so far.
    """
    work = _Reshard(source, path, shards=shards, storage=storage, overwrite=overwrite)
    rewrite(work, coordinator or SingleCoordinator(), progress)


def rewrite(work: Rewriting, ranks: Coordinator, progress: Callable[[int], None]) -> None:
    """Run the stages of a rewrite. Collective. The target appears when it is complete."""
    try:
        token = os.fsdecode(exchange(ranks, "begin", lambda: b"", work.begin))
        exchange(ranks, "join", lambda: work.join(token), lambda payloads: b"")
        exchange(ranks, "write", lambda: work.write(ranks, progress), work.commit)
    except BaseException:
        work.abandon()
        raise
    finally:
        work.close()


class Rewriting(Protocol):
    """One rank's part in writing a new file or folder. Every rank writes; rank 0 begins and
    commits.
    """

    def begin(self, payloads: list[bytes]) -> bytes:
        """Create the target, on rank 0. Returns the token with which the other ranks join."""

    def join(self, token: str) -> bytes:
        """Open the target, on the other ranks."""

    def write(self, ranks: Coordinator, progress: Callable[[int], None]) -> bytes:
        """Write the part of this rank. Returns the message for `commit`."""

    def commit(self, payloads: list[bytes]) -> bytes:
        """Write the index of all files and make the target visible, on rank 0."""

    def abandon(self) -> None:
        """Remove the written files. Called while the error is handled."""

    def close(self) -> None:
        """Release all resources."""


def even_plan(source: Source, shards: int) -> tuple[LocalPlan, GlobalPlan]:
    """Return the plan of a rank that holds all entries, and the global plan of `shards` such
    ranks.
    """
    if not (isinstance(shards, int) and 1 <= shards <= _MOST_SHARDS):
        raise StateError(
            "Invalid number of shards",
            expected=f"from 1 to {_MOST_SHARDS:,}",
            actual=repr(shards),
            remedy="pass a number in this range",
        )
    tensors = source.manifest.tensors
    specs = tuple(TensorSpec(name, entry.dtype, entry.shape) for name, entry in tensors.items())
    everything = LocalPlan(
        common=specs,
        rank_only=(),
        file_group=_file_groups(source.manifest),
        chunks=ChunkTable(
            tensor=np.arange(len(specs)),
            boxes=pad_boxes([((0,) * len(spec.shape), spec.shape) for spec in specs]),
        ),
        shared=np.ones(len(specs), dtype=np.bool_),
        tree=b"",
        per_rank_trees=b"",
    )
    return everything, global_plan([everything] * shards)


class _File(NamedTuple):
    """A file of a shard, and its rows in the chunks of the plan."""

    shard: int
    name: str
    rows: slice


class _Reshard:
    """See Rewriting."""

    def __init__(
        self, source: Source, path: str, *, shards: int, storage: Storage, overwrite: bool
    ) -> None:
        self.source, self.path, self.shards = source, path, shards
        self.storage, self.overwrite = storage, overwrite
        self.identity = new_id()
        self.transaction: WriteTransaction | None = None
        self.local_plan, self.plan = even_plan(source, shards)
        self.files = self._files()

    def _files(self) -> list[_File]:
        """List all files by shard. Their rows follow the order of the plan."""
        files, begin = [], 0
        for shard in range(self.shards):
            for file_group, count in RankWrites.of(self.local_plan, self.plan.shares[shard]).files:
                name = shard_name(rank=shard, world_size=self.shards, file_group=file_group)
                files.append(_File(shard, name, slice(begin, begin + count)))
                begin += count
        return files

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
        ends = np.append(0, np.cumsum(chunk_bytes(self.plan.specs, self.plan.chunks)))
        sizes = [int(ends[file.rows.stop] - ends[file.rows.start]) for file in self.files]
        assert self.transaction is not None
        return write_ranges(
            self.source,
            sizes,
            self._new_file,
            ranks,
            progress,
            one_rank_per_file=not self.transaction.shares_files,
        )

    def _new_file(self, number: int) -> NewFile:
        assert self.transaction is not None
        file, held = self.files[number], self.plan.chunks
        chunks = ChunkTable(tensor=held.tensor[file.rows], boxes=held.boxes[file.rows])
        header, size_bytes, _ = layout(self.plan.specs, chunks)
        return NewFile(
            header=header,
            size_bytes=size_bytes,
            specs=self.plan.specs,
            chunks=chunks,
            create=functools.partial(
                self.transaction.create, file.name, size_bytes=size_bytes, shared=True
            ),
        )

    def commit(self, payloads: list[bytes]) -> bytes:
        assert self.transaction is not None
        by_shard: list[list[ShardFile]] = [[] for _ in range(self.shards)]
        for file, written in zip(self.files, joined_files(payloads), strict=True):
            by_shard[file.shard].append(
                ShardFile(
                    name=file.name,
                    chunks=file.rows.stop - file.rows.start,
                    header_bytes=written.header_bytes,
                    size_bytes=written.size_bytes,
                    layout=written.layout,
                    digests=written.digests,
                )
            )
        results = [ShardResult(files=tuple(files)) for files in by_shard]
        committed = commit_manifest(
            self.transaction,
            checkpoint_id=self.identity,
            tensors=KnownPlan(self.plan).encoded_tensors(file_table(results)),
            results=results,
            tree=msgspec.json.encode(self.source.manifest.state),
            saved_by=self.source.manifest,
        )
        return msgspec.msgpack.encode(committed)

    def abandon(self) -> None:
        if self.transaction is not None:
            self.transaction.abandon()

    def close(self) -> None:
        if self.transaction is not None:
            self.transaction.close()


def _file_groups(manifest: Manifest) -> Ints:
    """Return the file group of each tensor: that of the file with its first chunk."""
    groups = [group_in_name(shard.name) for shard in manifest.shards]
    return np.array(
        [groups[e.chunks[0, 0]] if len(e.chunks) else MAIN for e in manifest.tensors.values()],
        dtype=np.int64,
    )
