"""Incremental saves: files and blocks that have not changed are taken over from the base, an
earlier checkpoint.

A file is linked if its name, its size and the digest of every block are those of the new file. In
a file that has changed, the blocks whose digests are those of the same blocks of the base are
cloned, if the file system can share ranges of files; the others are written. A base never fails a
save: what can't be linked or cloned is written.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Protocol

import torch
import xxhash

from shardckpt.errors import CorruptionError, ShardckptError, StateError
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.format.entries import Manifest, ShardEntry
from shardckpt.format.lazy_manifest import LazyManifest
from shardckpt.format.manifest import check_text
from shardckpt.io.buffers import view_at
from shardckpt.io.devices import Mark
from shardckpt.io.downloads import host_pieces
from shardckpt.io.tensor_memory import contiguous_pieces
from shardckpt.loading.shard_reader import check_size, corrupted_blocks
from shardckpt.storage.base import CheckpointFiles, WritableFile, WriteTransaction
from shardckpt.storage.resolve import Location

__all__ = ["Base", "ClonedBlocks", "OpenCheckpoint", "check_verify_base", "open_base"]

_SAMPLE = 16
"""The interval of the blocks that are read back of each file of the base. A corrupted block is
found within a few saves, and is then written.
"""


def check_verify_base(base: object, *, verify_base: bool) -> None:
    """Raise StateError if `verify_base` is set without a base."""
    if verify_base and base is None:
        raise StateError(
            "verify_base needs a base",
            expected="base=, an earlier checkpoint whose files are linked and verified",
            actual="verify_base=True and no base",
            remedy="pass base=, or leave verify_base out",
        )


class OpenCheckpoint(Protocol):
    """An open checkpoint, such as shardckpt.Checkpoint."""

    @property
    def files(self) -> CheckpointFiles:
        """Its files."""

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""


class Base:
    """An open base. `problems` lists why unchanged files and blocks could not be taken over."""

    def __init__(
        self, files: CheckpointFiles | None, shards: Iterable[ShardEntry], *, verify: bool
    ) -> None:
        self.problems: list[str] = []
        self._files = files
        self._shards = {shard.name: shard for shard in shards}
        self._verify = verify

    def link_unchanged(
        self,
        transaction: WriteTransaction,
        name: str,
        *,
        size_bytes: int,
        header: bytes,
        data: Iterable[torch.Tensor],
        submitted: Mapping[torch.device, Mark],
        progress: Callable[[int], None],
    ) -> ShardEntry | None:
        """Link the file of this name into the transaction, if the base has the same bytes.

        Returns:
            The entry in the base's manifest; None if the file must be written.
        """
        shard = self._shards.get(name)
        if self._files is None or shard is None or shard.size_bytes != size_bytes:
            return None
        expected = iter(shard.digests.tolist())
        with closing(_block_digests(header, data, submitted)) as digests:
            for number, digest in enumerate(digests, start=1):
                if digest != next(expected, None):
                    return None
                progress(number * BLOCK_BYTES)
        if next(expected, None) is not None:  # tensors were resized in the meantime
            return None
        try:
            self._check(self._files, shard)
            if transaction.link(name, self._files):
                return shard
            self.problems.append(f"{self._files.path}/{name}: can't be linked or cloned here")
        except (ShardckptError, OSError) as error:
            self.problems.append(str(error))
            del self._shards[name]  # its blocks must not be cloned either
        return None

    def _check(self, files: CheckpointFiles, shard: ShardEntry) -> None:
        """Raise an error if a file is missing, has another size, or has a corrupted block."""
        check_size(files, shard)
        blocks = len(shard.digests)
        step = 1 if self._verify else min(_SAMPLE, blocks)
        for block in range(secrets.randbelow(step), blocks, step):
            _check_block(files, shard, block)

    def create(
        self, transaction: WriteTransaction, name: str, *, size_bytes: int
    ) -> ClonedBlocks | None:
        """Create a file that has changed, if it can take blocks over from the base.

        Returns:
            The file. None if all blocks must be written, to a file that the caller creates.
        """
        shard = self._shards.get(name)
        if self._files is None or shard is None:
            return None
        try:
            check_size(self._files, shard)
        except (ShardckptError, OSError) as error:
            self.problems.append(str(error))
            return None
        file = transaction.create_from(name, self._files, size_bytes=size_bytes)
        step = 1 if self._verify else min(_SAMPLE, len(shard.digests))
        return ClonedBlocks(file, self._files, shard, self.problems, step=step) if file else None


class ClonedBlocks:
    """The blocks that a new file takes over from the same file of the base.

    Args:
        file: The new file.
        files: The files of the base.
        shard: The file of the base.
        problems: Corrupted blocks of the base are added to this list.
        step: The interval of the blocks of the base that are read back.

    Attributes:
        cloned_bytes: The bytes taken over so far.
    """

    def __init__(
        self,
        file: WritableFile,
        files: CheckpointFiles,
        shard: ShardEntry,
        problems: list[str],
        *,
        step: int,
    ) -> None:
        self.file = file
        self.cloned_bytes = 0
        self._files, self._shard, self._problems = files, shard, problems
        self._digests = shard.digests.tolist()
        self._step, self._phase = step, secrets.randbelow(step)
        self._lock = threading.Lock()

    def write(self, view: memoryview, offset: int, digests: Sequence[int]) -> None:
        """Write blocks to the file, or clone them. Called from any thread.

        Args:
            view: The blocks; the last block of the file may have bytes behind its end.
            offset: The offset of the first block.
            digests: The digest of each block.
        """
        first = offset // BLOCK_BYTES
        base = self._digests[first : first + len(digests)]
        same = [one == other for one, other in itertools.zip_longest(digests, base)]
        at = 0
        for is_same, run in itertools.groupby(same[: len(digests)]):
            end = at + len(list(run))
            if not is_same or not self._clone(first + at, first + end):
                data = view[at * BLOCK_BYTES : end * BLOCK_BYTES]
                self.file.write(data, offset=offset + at * BLOCK_BYTES)
            at = end

    def _clone(self, first: int, end: int) -> bool:
        """Clone blocks that have not changed. Returns whether the file has them intact."""
        low = first * BLOCK_BYTES
        size_bytes = min(end * BLOCK_BYTES, self._shard.size_bytes) - low
        if not self.file.clone(offset=low, size_bytes=size_bytes):
            return False
        try:
            for block in range(first, end):
                if block % self._step == self._phase:
                    _check_block(self._files, self._shard, block)
        except (ShardckptError, OSError) as error:
            self._problems.append(str(error))
            return False
        with self._lock:
            self.cloned_bytes += size_bytes
        return True


def _check_block(files: CheckpointFiles, shard: ShardEntry, block: int) -> None:
    """Read a block of the base. Raises CorruptionError if it is corrupted."""
    low = block * BLOCK_BYTES
    view = memoryview(bytearray(min(BLOCK_BYTES, shard.size_bytes - low)))
    files.readinto(shard.name, [view], offset=low)
    if corrupted_blocks(shard, low, view):
        raise CorruptionError(
            "A block of the base is corrupted and was written again",
            path=f"{files.path}/{shard.name}",
            expected="the bytes that were saved",
            actual=f"other bytes in block {block}",
            remedy="don't load the base; this checkpoint has the right bytes in this block",
        )


@contextmanager
def open_base(base: Location | OpenCheckpoint | None, *, verify: bool) -> Iterator[Base | None]:
    """Open the base of a save, if there is one, for a with block. Not collective.

    A base that can't be opened has no files, and `problems` has the reason. An open checkpoint
    stays open.

    Args:
        base: A path in its storage, an open checkpoint, or None.
        verify: Read back every block of a linked file, instead of a sample.

    Yields:
        The base, or None.
    """
    if base is None:
        yield None
        return
    if not isinstance(base, Location):
        yield Base(base.files, base.manifest.shards, verify=verify)
        return
    files: CheckpointFiles | None = None
    try:
        try:
            files = base.storage.open(base.path)
            check_text(data := files.manifest(), path=files.path)
            shards = LazyManifest(data, path=files.path).all_shards()
            opened = Base(files, shards, verify=verify)
        except (ShardckptError, OSError) as error:
            opened = Base(None, (), verify=verify)
            opened.problems.append(str(error))
        yield opened
    finally:
        if files is not None:
            files.close()


def _block_digests(
    header: bytes, tensors: Iterable[torch.Tensor], submitted: Mapping[torch.device, Mark]
) -> Generator[int, None, None]:
    """Yield the digest of each block of the file that holds the header and the tensors."""
    digest = xxhash.xxh3_64()
    room = BLOCK_BYTES
    head = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    with closing(_pieces(itertools.chain([head], tensors), submitted)) as pieces:
        for part in pieces:
            at, size = 0, part.numel() * part.element_size()
            while at < size:
                take = min(room, size - at)
                view = view_at(part.data_ptr() + at, take)
                at += take
                if take == BLOCK_BYTES:
                    yield block_digest(view)
                    continue
                digest.update(view)
                room -= take
                if not room:
                    yield digest.intdigest()
                    digest.reset()
                    room = BLOCK_BYTES
    if room < BLOCK_BYTES:
        yield digest.intdigest()


def _pieces(
    tensors: Iterator[torch.Tensor], submitted: Mapping[torch.device, Mark]
) -> Generator[torch.Tensor, None, None]:
    """Yield the elements of tensors on any device as contiguous CPU tensors."""
    for tensor in tensors:
        if tensor.is_cpu:
            yield from contiguous_pieces(tensor)
        else:
            yield from host_pieces(itertools.chain([tensor], tensors), submitted)
