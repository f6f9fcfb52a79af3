"""Write the shards of one rank, in parallel."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import msgspec
import torch

from shardckpt.coordination.base import Coordinator
from shardckpt.errors import StorageError
from shardckpt.format.dtype_names import shard_form
from shardckpt.format.safetensors_header import build_header, chunk_name
from shardckpt.io.devices import Mark, submitted_work
from shardckpt.io.gc_pause import collector_paused
from shardckpt.plan.local_plan import ChunkTable, LocalPlan, TensorSpec
from shardckpt.plan.save_plan import RankWrites
from shardckpt.plan.shard_layout import FileLayout, chunk_bytes, layout_digests, shard_name
from shardckpt.reports import Stopwatch
from shardckpt.saving.agreement import Agreement
from shardckpt.saving.incremental import Base
from shardckpt.saving.replicas import replica_digests
from shardckpt.saving.shard_writer import write_shard
from shardckpt.saving.staged_part import StagedPart, planned_data
from shardckpt.storage.base import WriteTransaction

__all__ = ["RankShards", "ShardFile", "ShardResult", "layout", "write_agreed", "write_rank"]


class ShardFile(msgspec.Struct, array_like=True, kw_only=True):
    """A file that a rank has written.

    Attributes:
        name: Its name.
        chunks: The number of chunks in it.
        header_bytes: The size of its header.
        size_bytes: Its size.
        layout: The digest of its chunks, see layout_digests.
        digests: The digests of its blocks, as little-endian numbers of 8 bytes.
        linked_bytes: The bytes that were linked or cloned from the base.
    """

    name: str
    chunks: int
    header_bytes: int
    size_bytes: int
    layout: int
    digests: bytes
    linked_bytes: int = 0


class ShardResult(msgspec.Struct, array_like=True, kw_only=True):
    """The files that a rank has written, as it reports them to rank 0.

    See WriteTransaction for `commits_part`.
    """

    files: tuple[ShardFile, ...]
    problems: tuple[str, ...] = ()
    replicas: bytes = b""
    per_rank_trees: bytes = b"[]"
    seconds: dict[str, float] = {}
    commits_part: bool = False

    @property
    def size_bytes(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size_bytes for file in self.files)

    @property
    def linked_bytes(self) -> int:
        """The bytes of all files that were linked or cloned from the base."""
        return sum(file.linked_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShards:
    """The chunks that one rank writes, and the files that they go to.

    Attributes:
        rank: The rank.
        world_size: The number of ranks, for the names of the files.
        specs: The tensors; `chunks` refers to them.
        chunks: The chunks in the order of the files.
        files: The file group of each file and the number of chunks in it.
        data: Returns the elements of a slice of the chunks, in order. It is called once or twice
            for each file, from any thread.
        layouts: The layouts known from an earlier save, see RankWrites; new ones are added.
        staged: The data does not change while it is written.
    """

    rank: int
    world_size: int
    specs: Sequence[TensorSpec]
    chunks: ChunkTable
    files: Sequence[tuple[int, int]]
    data: Callable[[slice], Iterable[torch.Tensor]]
    layouts: dict[int, FileLayout] = field(default_factory=dict)
    staged: bool = False

    @classmethod
    def of(
        cls,
        local: LocalPlan,
        writes: RankWrites,
        *,
        rank: int,
        world_size: int,
        staged: bool = False,
        data: Sequence[torch.Tensor] | None = None,
    ) -> RankShards:
        """Return the chunks that a rank writes of its local plan. `data` are their elements, if
        they are not those of the plan.
        """
        data = planned_data(local, writes) if data is None else data
        return cls(
            rank=rank,
            world_size=world_size,
            specs=(*local.common, *local.rank_only),
            chunks=ChunkTable(tensor=local.chunks.tensor[writes.row], boxes=writes.boxes),
            files=writes.files,
            data=lambda rows: data[rows],
            layouts=writes.layouts,
            staged=staged,
        )


def write_agreed(
    agreement: Agreement,
    coordinator: Coordinator,
    base: AbstractContextManager[Base | None],
    work: Stopwatch,
    *,
    check_replicas: bool,
    staged: bool,
    part: StagedPart | None = None,
) -> ShardResult:
    """Write this rank's part of the agreed plan, durably. Not collective.

    `work` counts the seconds of "write", "sync" and "compare".

    Returns:
        The written files, for the commit.

    Raises:
        StateError: `part` was staged for another division of the work.
    """
    local, writes = agreement.local, agreement.writes
    if part is not None:
        part.check(writes)
    with work.phase("write"), base as opened_base:
        with collector_paused(), torch.no_grad():
            shards = RankShards.of(
                local,
                writes,
                rank=coordinator.rank,
                world_size=coordinator.world_size,
                staged=staged,
                data=None if part is None else part.data,
            )
        result = write_rank(
            agreement.transaction, shards, base=opened_base, progress=coordinator.progress
        )
    work.seconds["write"] -= result.seconds["sync"]
    with work.phase("compare"):
        result.replicas = (
            part.replicas
            if part is not None
            else replica_digests(local, writes, everything=check_replicas, sampled=agreement.merged)
        )
    result.per_rank_trees = local.per_rank_trees
    result.commits_part = agreement.transaction.commits_part
    work.seconds.update(result.seconds)
    result.seconds = work.seconds
    return result


def write_rank(
    transaction: WriteTransaction,
    shards: RankShards,
    *,
    base: Base | None = None,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> ShardResult:
    """Write a rank's files, durably. Not collective.

    Args:
        transaction: The checkpoint that is being written.
        shards: The chunks to write.
        base: An earlier checkpoint. Files and blocks that have not changed since are linked and
            cloned, not written.
        progress: Called with the number of bytes written so far.
    """
    total = _Total(progress)
    ends = list(itertools.accumulate(count for _, count in shards.files))
    jobs = [
        (group, slice(end - count, end))
        for (group, count), end in zip(shards.files, ends, strict=True)
    ]
    watches = [Stopwatch() for _ in jobs]
    submitted = submitted_work()  # other threads have other current streams

    def write(index: int) -> ShardFile:
        group, rows = jobs[index]
        return _write_file(transaction, shards, group, rows, base, submitted, total, watches[index])

    # Files are written in parallel, so that the fsync of one file does not delay another one.
    with ThreadPoolExecutor(len(jobs), "shardckpt-file") as pool:
        others = [pool.submit(write, index) for index in range(1, len(jobs))]
        try:
            first = write(0)
        finally:
            wait(others)
        return ShardResult(
            files=(first, *(file.result() for file in others)),
            problems=tuple(base.problems) if base else (),
            seconds={"sync": max(watch.seconds.get("sync", 0.0) for watch in watches)},
        )


def _write_file(
    transaction: WriteTransaction,
    shards: RankShards,
    group: int,
    rows: slice,
    base: Base | None,
    submitted: Mapping[torch.device, Mark],
    total: _Total,
    watch: Stopwatch,
) -> ShardFile:
    """Link one file from the base, or write it, apart from blocks that the base has."""
    chunks = ChunkTable(tensor=shards.chunks.tensor[rows], boxes=shards.chunks.boxes[rows])
    name = shard_name(rank=shards.rank, world_size=shards.world_size, file_group=group)
    header, size_bytes, digest = _layout_once(group, shards.layouts, shards.specs, chunks)
    progress = total.of(name)
    linked = base and base.link_unchanged(
        transaction,
        name,
        size_bytes=size_bytes,
        header=header,
        data=shards.data(rows),
        submitted=submitted,
        progress=progress,
    )
    if linked:
        digests, linked_bytes = linked.digests, size_bytes
    else:
        cloned = base and base.create(transaction, name, size_bytes=size_bytes)
        file = cloned.file if cloned else transaction.create(name, size_bytes=size_bytes)
        try:
            written_bytes, digests = write_shard(
                file,
                header=header,
                tensors=shards.data(rows),
                staged=shards.staged,
                submitted=submitted,
                progress=progress,
                write=cloned.write if cloned else None,
            )
            if written_bytes != size_bytes:
                raise _resized(f"{transaction.path}/{name}", shards.rank, size_bytes, written_bytes)
            with watch.phase("sync"):
                file.close(size_bytes=size_bytes)
        except BaseException:
            file.discard()
            raise
        linked_bytes = cloned.cloned_bytes if cloned else 0
    return ShardFile(
        name=name,
        chunks=len(chunks),
        header_bytes=len(header),
        size_bytes=size_bytes,
        layout=digest,
        digests=digests.astype("<u8").tobytes(),
        linked_bytes=linked_bytes,
    )


def _resized(path: str, rank: int, planned_bytes: int, written_bytes: int) -> StorageError:
    return StorageError(
        "A shard does not have the planned size",
        path=path,
        rank=rank,
        expected=f"{planned_bytes} bytes",
        actual=f"{written_bytes} bytes",
        remedy="don't resize tensors while they are being saved",
    )


class _Total:
    """The sum of the bytes of several files."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}

    def of(self, name: str) -> Callable[[int], None]:
        """Return the function that counts the bytes of one file."""

        def progress(written_bytes: int) -> None:
            with self._lock:
                self._bytes[name] = written_bytes
                self._progress(sum(self._bytes.values()))

        return progress


def _layout_once(
    group: int,
    known: dict[int, FileLayout],
    specs: Sequence[TensorSpec],
    chunks: ChunkTable,
) -> FileLayout:
    if group not in known:
        with collector_paused():
            known[group] = layout(specs, chunks)
    return known[group]


def layout(specs: Sequence[TensorSpec], chunks: ChunkTable) -> FileLayout:
    """Return the layout of a file that holds the chunks."""
    sizes = chunk_bytes(specs, chunks).tolist()
    entries = []
    dtypes: dict[str, str] = {}
    for index, box, size in zip(chunks.tensor.tolist(), chunks.boxes.tolist(), sizes, strict=True):
        spec, dims = specs[index], len(specs[index].shape)
        shape = tuple(box[1][:dims])
        entry = chunk_name(spec.name, spec.shape, tuple(box[0][:dims]), shape)
        entries.append((entry, *shard_form(spec.dtype, shape), size))
        if entries[-1][1] != spec.dtype:
            dtypes[spec.name] = spec.dtype
    # The metadata must not differ from save to save: unchanged tensors must give the same bytes.
    extra = {"dtypes": msgspec.json.encode(dtypes).decode()} if dtypes else {}
    header = build_header(entries, {"format": "shardckpt", **extra})
    (digest,) = layout_digests(specs, chunks, [0, len(chunks)])
    return FileLayout(header, len(header) + sum(sizes), digest)
