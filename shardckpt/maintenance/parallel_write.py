"""Several ranks write the same files, each an equal share of the bytes, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardckpt.coordination.base import Coordinator
from shardckpt.maintenance.rewritable import Source, read_chunks
from shardckpt.plan.file_ranges import FileRange, file_ranges
from shardckpt.plan.local_plan import ChunkTable, TensorSpec
from shardckpt.plan.plan_cache import shard_mismatch
from shardckpt.plan.shard_layout import layout_digests
from shardckpt.saving.shard_writer import write_shard
from shardckpt.storage.base import WritableFile

__all__ = ["NewFile", "WrittenFile", "joined_files", "write_ranges"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """A safetensors file to write: its header, its chunks, and how each rank opens it (see
    WriteTransaction.create)."""

    header: bytes
    size_bytes: int
    specs: Sequence[TensorSpec]
    chunks: ChunkTable
    create: Callable[[], WritableFile]


class WrittenFile(msgspec.Struct, array_like=True, kw_only=True):
    """A file, or the range of it that a rank wrote: the digests of its blocks, in order. `layout`
    is the digest of the chunks of the file, see layout_digests."""

    file: int
    header_bytes: int
    size_bytes: int
    layout: int
    digests: bytes

    def of_blocks(self) -> NDArray[np.uint64]:
        """Return the digests as an array."""
        return np.frombuffer(self.digests, dtype="<u8").astype(np.uint64)


def write_ranges(
    source: Source,
    sizes_bytes: Sequence[int],
    new_file: Callable[[int], NewFile],
    ranks: Coordinator,
    progress: Callable[[int], None],
    *,
    one_rank_per_file: bool = False,
) -> bytes:
    """Write the ranges of this rank, durably. Not collective.

    Args:
        source: The checkpoint to read.
        sizes_bytes: The bytes of data of each file.
        new_file: Lays out a file by its number. The result is equal on all ranks.
        ranks: The ranks that divide the work.
        progress: Called with the bytes that this rank wrote so far.
        one_rank_per_file: Never divide a file.

    Returns:
        The message for `joined_files`.
    """
    written: list[WrittenFile] = []
    done_bytes = 0
    ranges = file_ranges(
        sizes_bytes,
        rank=ranks.rank,
        world_size=ranks.world_size,
        one_rank_per_file=one_rank_per_file,
    )
    for part in ranges:

        def advance(size_bytes: int, before: int = done_bytes) -> None:
            ranks.progress(before + size_bytes)
            progress(before + size_bytes)

        new = new_file(part.file)
        end, digests = _write_range(source, new, part, advance)
        done_bytes += end - part.begin
        (layout,) = layout_digests(new.specs, new.chunks, [0, len(new.chunks)])
        written.append(
            WrittenFile(
                file=part.file,
                header_bytes=len(new.header),
                size_bytes=new.size_bytes,
                layout=layout,
                digests=digests.astype("<u8").tobytes(),
            )
        )
    return msgspec.msgpack.encode(written)


def _write_range(
    source: Source, new: NewFile, part: FileRange, progress: Callable[[int], None]
) -> tuple[int, NDArray[np.uint64]]:
    head, end = len(new.header), new.size_bytes if part.end is None else part.end
    file = new.create()
    try:
        reached, digests = write_shard(
            file,
            header=new.header[part.begin : end],
            tensors=read_chunks(
                source,
                new.specs,
                new.chunks,
                begin=max(part.begin - head, 0),
                end=max(end - head, 0),
            ),
            begin=part.begin,
            progress=progress,
        )
        assert reached == end, "a source whose boxes have other sizes than its manifest says"
        file.close(size_bytes=new.size_bytes)
    except BaseException:
        file.discard()
        raise
    return end, digests


def joined_files(payloads: Sequence[bytes]) -> list[WrittenFile]:
    """Return all files in order, from the messages of all ranks, in rank order.

    Raises:
        ShardMismatchError: Ranks have written parts of a file with other chunks, or in another
            order.
    """
    decode = msgspec.msgpack.Decoder(list[WrittenFile]).decode
    files: list[WrittenFile] = []
    for rank, payload in enumerate(payloads):
        for part in decode(payload):
            if not files or files[-1].file != part.file:
                files.append(part)
                continue
            if files[-1].layout != part.layout:
                raise shard_mismatch(
                    rank, expected=f"the chunks of file {part.file} on the other ranks"
                )
            files[-1].digests += part.digests
    return files
