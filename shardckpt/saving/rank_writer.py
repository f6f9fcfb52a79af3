"""Write the files of a rank's shard, side by side."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from shardckpt.errors import StorageError
from shardckpt.format.safetensors_header import build_header, chunk_name
from shardckpt.io.gc_pause import collector_paused
from shardckpt.plan.local_plan import ChunkTable, TensorSpec
from shardckpt.plan.shard_layout import chunk_bytes, shard_name
from shardckpt.reports import Stopwatch
from shardckpt.saving.incremental import Base
from shardckpt.saving.shard_writer import write_shard
from shardckpt.storage.base import WriteTransaction

__all__ = ["ShardFile", "ShardResult", "layout", "write_rank"]


class ShardFile(msgspec.Struct, array_like=True, kw_only=True):
    """A file that a rank has written: its first `chunks` chunks that no file before it holds."""

    name: str
    chunks: int
    header_bytes: int
    size_bytes: int
    digests: bytes
    linked: bool = False


class ShardResult(msgspec.Struct, array_like=True, kw_only=True):
    """What a rank tells rank 0 of the files that it has written."""

    files: tuple[ShardFile, ...]
    problems: tuple[str, ...] = ()
    replicas: bytes = b""
    own_trees: bytes = b"[]"
    seconds: dict[str, float] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def linked_bytes(self) -> int:
        """Of these, bytes of files that the base has given."""
        return sum(file.size_bytes for file in self.files if file.linked)


def write_rank(
    transaction: WriteTransaction,
    *,
    rank: int,
    world_size: int,
    specs: Sequence[TensorSpec],
    chunks: ChunkTable,
    files: Sequence[tuple[int, int]],
    data: Callable[[slice], Iterable[torch.Tensor]],
    layouts: dict[int, tuple[bytes, int]] | None = None,
    base: Base | None = None,
    staged: bool = False,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> ShardResult:
    """Write a rank's files, durably. Not collective.

    `files`: the kind of each and how many of the chunks, in order, it holds. `data(part)` are
    the elements of these chunks in order; it is called once for each file, from any thread.
    `layouts`: see RankWrites. `progress` is called with the bytes handed to the file system so far.
    What `base` holds already is linked, not written. `staged`: nobody changes the data meanwhile.
    """
    total = _Total(progress)
    watches = {kind: Stopwatch() for kind, _ in files}
    ends = list(itertools.accumulate(count for _, count in files))

    def write(kind: int, begin: int, end: int) -> ShardFile:
        part = slice(begin, end)
        own = ChunkTable(tensor=chunks.tensor[part], boxes=chunks.boxes[part])
        name = shard_name(rank=rank, world_size=world_size, kind=kind)
        header, size_bytes = _layout_once(kind, {} if layouts is None else layouts, specs, own)
        shard = base and base.take_over(
            transaction,
            name,
            size_bytes=size_bytes,
            header=header,
            data=data(part),
            progress=total.of(name),
        )
        digests = (
            shard.digests
            if shard
            else _write_file(
                transaction,
                name,
                rank=rank,
                header=header,
                size_bytes=size_bytes,
                data=data(part),
                staged=staged,
                progress=total.of(name),
                watch=watches[kind],
            )
        )
        return ShardFile(
            name=name,
            chunks=len(own),
            header_bytes=len(header),
            size_bytes=size_bytes,
            digests=digests.astype("<u8").tobytes(),
            linked=shard is not None,
        )

    jobs = [(kind, end - count, end) for (kind, count), end in zip(files, ends, strict=True)]
    # Side by side, so that one file's way to the disk (fsync) does not hold up another.
    with ThreadPoolExecutor(len(jobs), "shardckpt-file") as pool:
        written = [pool.submit(write, *job) for job in jobs[1:]]
        try:
            first = write(*jobs[0])
        finally:
            wait(written)
        return ShardResult(
            files=(first, *(file.result() for file in written)),
            problems=tuple(base.problems) if base else (),
            seconds={"sync": max(watch.seconds.get("sync", 0.0) for watch in watches.values())},
        )


class _Total:
    """The sum of what several files have come to."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}

    def of(self, name: str) -> Callable[[int], None]:
        """The progress of one file."""

        def progress(written_bytes: int) -> None:
            with self._lock:
                self._bytes[name] = written_bytes
                self._progress(sum(self._bytes.values()))

        return progress


def _write_file(
    transaction: WriteTransaction,
    name: str,
    *,
    rank: int,
    header: bytes,
    size_bytes: int,
    data: Iterable[torch.Tensor],
    staged: bool,
    progress: Callable[[int], None],
    watch: Stopwatch,
) -> NDArray[np.uint64]:
    file = transaction.create(name, size_bytes=size_bytes)
    try:
        size, digests = write_shard(
            file, header=header, tensors=data, staged=staged, progress=progress
        )
        if size != size_bytes:
            raise StorageError(
                "A shard has another size than was planned",
                path=f"{transaction.path}/{name}",
                rank=rank,
                expected=f"{size_bytes} bytes",
                actual=f"{size} bytes",
                remedy="don't resize tensors while they are being saved",
            )
        with watch.phase("sync"):
            file.close(size_bytes=size)
    except BaseException:
        file.discard()
        raise
    return digests


def _layout_once(
    kind: int,
    known: dict[int, tuple[bytes, int]],
    specs: Sequence[TensorSpec],
    chunks: ChunkTable,
) -> tuple[bytes, int]:
    if kind not in known:
        with collector_paused():
            known[kind] = layout(specs, chunks)
    return known[kind]


def layout(specs: Sequence[TensorSpec], chunks: ChunkTable) -> tuple[bytes, int]:
    """The header of a file that holds the chunks, and the size of the file in bytes."""
    sizes = chunk_bytes(specs, chunks).tolist()
    entries = []
    for index, box, size in zip(chunks.tensor.tolist(), chunks.boxes.tolist(), sizes, strict=True):
        spec, dims = specs[index], len(specs[index].shape)
        shape = tuple(box[1][:dims])
        own = chunk_name(spec.name, spec.shape, tuple(box[0][:dims]), shape)
        entries.append((own, spec.dtype, shape, size))
    # Nothing that differs from save to save: what did not change must be the same bytes.
    header = build_header(entries, {"format": "shardckpt"})
    return header, len(header) + sum(sizes)
