"""What a place for checkpoints must do. `shardckpt.testing` holds tests for new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = [
    "MANIFEST_NAME",
    "CheckpointFiles",
    "Done",
    "Storage",
    "WouldWait",
    "WritableFile",
    "WriteTransaction",
]

MANIFEST_NAME = "manifest.json"

Done = Callable[[memoryview], object]
"""Called with a buffer once it is full."""


class WouldWait(Exception):
    """Raised by CheckpointFiles.readinto for bytes that are not at hand."""


class Storage(Protocol):
    """A place for checkpoints, each known by a path. Nothing here is collective."""

    def begin(self, path: str, *, checkpoint_id: str, overwrite: bool) -> WriteTransaction:
        """Begin a checkpoint; rank 0 alone. Nothing is visible at `path` before commit.

        Raises CheckpointExistsError if the path is taken and `overwrite` is false,
        NotACheckpointError if what stands there is no checkpoint, CheckpointBusyError if
        another save to it is under way.
        """

    def join(self, path: str, *, token: str) -> WriteTransaction:
        """Take part in what rank 0 began; `token` is its transaction's.

        Raises DirectoryNotSharedError if this rank does not see it.
        """

    def open(self, path: str) -> CheckpointFiles:
        """Open a committed checkpoint, on any rank.

        Raises CheckpointNotFoundError or NotACheckpointError.
        """


class WriteTransaction(Protocol):
    """A checkpoint being written. `token` is what other ranks need to join."""

    path: str
    token: str

    def create(self, name: str, *, size_bytes: int, shared: bool = False) -> WritableFile:
        """A new file in it; it must not exist. Space for `size_bytes` is set aside if possible.

        `shared`: several ranks call this, and each writes a part of the file, from one multiple of
        1 MiB to another or the end. Each makes what it has written durable when it closes.
        """

    def link(self, name: str, source: CheckpointFiles) -> bool:
        """Take the file of this name over from an open checkpoint, durably and without writing it
        anew; on any rank. The file stays whole whatever becomes of the source.

        False where that is not possible, for any reason; nothing has been made then, and the
        name can be created. A storage may always say so.
        """

    def commit(self, manifest: bytes) -> None:
        """Write the manifest and make all visible at once; durable on return. Rank 0 alone."""

    def abandon(self) -> None:
        """Remove what was written, as far as that works; never raises. No-op after commit."""

    def close(self) -> None:
        """Release what is held; never raises."""


class WritableFile(Protocol):
    """A file being written. If `direct`, buffers, offsets and lengths must be multiples of 4096."""

    direct: bool

    def write(self, data: memoryview, *, offset: int) -> None:
        """Write all of `data` at `offset`; from any thread, without the interpreter lock."""

    def close(self, *, size_bytes: int) -> None:
        """Cut to size, make durable, close. Raises StorageError if that can't be assured."""

    def discard(self) -> None:
        """Close without more ado; never raises."""


class CheckpointFiles(Protocol):
    """The files of a committed checkpoint."""

    path: str

    def manifest(self) -> bytes:
        """The manifest's bytes."""

    def size_bytes(self, name: str) -> int:
        """The size of a shard; CorruptionError if it is missing or no regular file."""

    def readinto(
        self,
        name: str,
        buffers: Sequence[memoryview],
        *,
        offset: int,
        done: Done = lambda buffer: None,
        wait: bool = True,
    ) -> None:
        """Fill the buffers, one after another, from `offset` on; from any thread.

        `done` is called with each as soon as it is full: its bytes are still in the processor's
        cache then. CorruptionError where the shard is missing or ends before they are full.
        If `wait` is false, WouldWait where a disk or another machine has to be asked, or may have
        to be; a storage may always raise that.
        """

    def read_past_cache(
        self, name: str, buffer: memoryview, *, offset: int, size_bytes: int
    ) -> bool:
        """Read `size_bytes` from `offset` on into the beginning of a buffer, and leave them out of
        the page cache; from any thread. Raises as readinto.

        False, and nothing read, where the page cache has them already or can't be passed by:
        `readinto` is the way then. A storage may always say so. Buffer and offset are multiples of
        4096, and the buffer has room for as many bytes, rounded up to such a multiple.
        """

    def map(self, name: str) -> memoryview:
        """A shard mapped into memory, copied on write; stays valid after close."""

    def duplicate(self) -> CheckpointFiles:
        """The same files, to be closed by themselves. Raises StorageError."""

    def close(self) -> None:
        """Release what is held; never raises."""
