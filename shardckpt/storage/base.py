"""The interface of a storage, a set of places for checkpoints.

A storage of your own subclasses these four classes and defines their abstract methods. Everything
else has a default that is right, if slower than it could be. `shardckpt.testing.StorageTests`
checks a storage; docs/how-to/storage.md shows a complete one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import NoReturn

from shardckpt.errors import CheckpointNotFoundError, StateError

__all__ = [
    "MANIFEST_NAME",
    "CheckpointFiles",
    "OnFilled",
    "Storage",
    "WouldWait",
    "WritableFile",
    "WriteTransaction",
]

MANIFEST_NAME = "manifest.json"

OnFilled = Callable[[memoryview], object]
"""Called with a buffer once it is full."""


class WouldWait(Exception):
    """Raised by CheckpointFiles.readinto if the bytes are not in memory and `wait` is false."""


class Storage(ABC):
    """The interface of a storage for checkpoints, each with a path. No method is collective.

    A path is a text whose parts are separated by `/`. Only the storage knows what it means.

    A read-only storage implements only `open`. One that a CheckpointManager uses also implements
    `names` and `remove`. `shardckpt.testing` has tests for new storages, and
    `shardckpt.LocalStorage` is the default.

    Example:
        >>> import torch, shardckpt
        >>> storage = shardckpt.LocalStorage()
        >>> isinstance(storage, shardckpt.Storage)
        True
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1", storage=storage)
    """

    def full_path(self, path: str) -> str:
        """Return the path in full: the text by which reports and errors name it.

        Calling it with its own result changes nothing. The default returns the path.

        Args:
            path: A path that a user gave.

        Raises:
            StateError: The path is invalid in this storage.
        """
        if not path:
            raise StateError("Invalid path", expected="a non-empty text", actual=repr(path))
        return path

    def child(self, folder: str, name: str) -> str:
        """Return the path of a name in a folder. The default joins them with `/`."""
        return f"{folder.rstrip('/')}/{name}"

    @abstractmethod
    def open(self, path: str) -> CheckpointFiles:
        """Open a committed checkpoint, on any rank.

        Args:
            path: The checkpoint.

        Returns:
            Its files.

        Raises:
            CheckpointNotFoundError: The path does not exist.
            NotACheckpointError: The path does not hold a checkpoint.
        """

    def begin(self, path: str, *, checkpoint_id: str, overwrite: bool) -> WriteTransaction:
        """Begin a checkpoint, on rank 0 alone. Nothing is visible at the path before commit.

        Args:
            path: Where the checkpoint goes.
            checkpoint_id: Its id, 32 hex digits that no other checkpoint has.
            overwrite: Replace a checkpoint at the path.

        Returns:
            The transaction, in which rank 0 creates files and commits.

        Raises:
            CheckpointExistsError: The path exists, and `overwrite` is false.
            NotACheckpointError: The path does not hold a checkpoint.
            CheckpointBusyError: Another save to the path is under way.
        """
        self._refuse_writing(path)

    def join(self, path: str, *, token: str) -> WriteTransaction:
        """Take part in the checkpoint that rank 0 began, on any other rank.

        Args:
            path: As for begin.
            token: The token of rank 0's transaction.

        Returns:
            The transaction, in which this rank creates files.

        Raises:
            DirectoryNotSharedError: This rank does not see what rank 0 began.
        """
        self._refuse_writing(path)

    def names(self, folder: str) -> list[str]:
        """List the names in a folder that may be checkpoints, sorted; none in a missing folder.

        Names that lead to another name in the folder are left out.

        Raises:
            StorageError: The folder can't be read.
        """
        self._refuse("This storage can't list a folder", folder, "a storage that defines names")

    def exists(self, path: str) -> bool:
        """Ask whether there is something at a path. The default opens it as a checkpoint."""
        try:
            self.open(path).close()
        except CheckpointNotFoundError:
            return False
        return True

    def version(self, path: str) -> Hashable:
        """Return a value that changes when the checkpoint at the path is replaced.

        The default reads the manifest.

        Raises:
            CheckpointError: There is no checkpoint at the path.
        """
        files = self.open(path)
        try:
            return hashlib.sha256(files.manifest()).digest()
        finally:
            files.close()

    def remove(self, path: str) -> None:
        """Remove a checkpoint: all at once from its path, then its files as far as that works.

        Raises:
            CheckpointBusyError: A save to the path is under way.
            StorageError: The checkpoint is not removed.
        """
        self._refuse("This storage can't remove", path, "a storage that defines remove")

    def sweep(self, folder: str) -> None:  # noqa: B027
        """Remove what dead saves and removals left in a folder, as far as that works.

        Never raises OSError. The default leaves everything.
        """

    def _refuse_writing(self, path: str) -> NoReturn:
        self._refuse(
            "This storage can't be written to", path, "a storage that defines begin and join"
        )

    def _refuse(self, message: str, path: str, expected: str) -> NoReturn:
        raise StateError(
            message,
            path=path,
            expected=expected,
            actual=type(self).__qualname__,
            remedy="use another storage, such as a LocalStorage",
        )


class WriteTransaction(ABC):
    """A checkpoint being written, on one rank.

    Attributes:
        path: Where the checkpoint goes.
        token: A text by which other ranks join.
        shares_files: Several ranks can write parts of one file; see `create`.
    """

    path: str
    token: str
    shares_files: bool = True

    @abstractmethod
    def create(self, name: str, *, size_bytes: int, shared: bool = False) -> WritableFile:
        """Create a file in the checkpoint.

        Args:
            name: The file's name. Only a shared file may exist already.
            size_bytes: The size that it will have, to set space aside.
            shared: Several ranks create the file, and each writes a part of it: from one multiple
                of 1 MiB to another one, or to the end.

        Raises:
            StorageError: The file exists, or there is no space for it.
        """

    @abstractmethod
    def commit(self, manifest: bytes) -> None:
        """Write the manifest and make the checkpoint visible, all of it at once; on rank 0 alone.

        The checkpoint is durable when this returns. The manifest begins with
        `{"format":"shardckpt","version":1,"id":"ID"`, with the id of `begin`.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Remove what was written, as far as that is possible. Never raises. Does nothing after
        commit, and nothing when called again."""

    def link(self, name: str, source: CheckpointFiles) -> bool:
        """Take over a file from an open checkpoint without writing it anew, durably; on any rank.

        The file must stay intact whatever becomes of the source.

        Returns:
            False if that is not possible: nothing has been made, and the file can be created. The
            default always returns False.
        """
        return False

    def close(self) -> None:  # noqa: B027
        """Release what is held. Never raises. The default holds nothing."""


class WritableFile(ABC):
    """A file being written.

    Attributes:
        direct: Buffers, offsets and lengths must be multiples of 4096.
    """

    direct: bool = False

    @abstractmethod
    def write(self, data: memoryview, *, offset: int) -> None:
        """Write all of `data` at `offset`; from any thread, best without the interpreter lock."""

    @abstractmethod
    def close(self, *, size_bytes: int) -> None:
        """Cut the file to its size, make it durable, and close it.

        Raises:
            StorageError: The bytes may not be durable.
        """

    def discard(self) -> None:  # noqa: B027
        """Close the file after an error. Never raises. The default holds nothing."""


class CheckpointFiles(ABC):
    """The files of a committed checkpoint.

    Attributes:
        path: Where the checkpoint is.
        in_memory: Reads never wait for a disk or another machine.
        remote: Each call is a request to another machine. Then a load does not ask for sizes before
            it reads, reads across gaps of up to a block, and has at least 8 reads in flight.
    """

    path: str
    in_memory: bool = False
    remote: bool = False

    @abstractmethod
    def manifest(self) -> bytes:
        """Return the bytes of the manifest."""

    @abstractmethod
    def size_bytes(self, name: str) -> int:
        """Return the size of a shard.

        Raises:
            CorruptionError: The shard is missing, or not a regular file.
        """

    @abstractmethod
    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """Fill a buffer with the bytes of a shard from `offset` on; from any thread.

        Raises:
            CorruptionError: The shard is missing, or ends before the buffer is full.
        """

    def readinto(
        self,
        name: str,
        buffers: Sequence[memoryview],
        *,
        offset: int,
        on_filled: OnFilled = lambda buffer: None,
        wait: bool = True,
    ) -> None:
        """Fill buffers one after another, as `read` fills one; from any thread.

        Args:
            name: The shard.
            buffers: The buffers.
            offset: Where in the shard the first one begins.
            on_filled: Called with each buffer as soon as it is full, while its bytes are in the
                processor's cache.
            wait: If false, raise WouldWait instead of asking a disk or another machine. The default
                raises it unless `in_memory`.
        """
        if not wait and not self.in_memory:
            raise WouldWait(name)
        for buffer in buffers:
            self.read(name, buffer, offset=offset)
            offset += len(buffer)
            on_filled(buffer)

    def read_past_cache(
        self, name: str, buffer: memoryview, *, offset: int, size_bytes: int
    ) -> bool:
        """Fill the beginning of a buffer without the page cache; from any thread.

        Args:
            name: The shard.
            buffer: A buffer at a multiple of 4096, with room for `size_bytes` rounded up to one.
            offset: Where in the shard to begin, a multiple of 4096.
            size_bytes: The bytes to read.

        Returns:
            False, and nothing is read, if the page cache has the bytes or can't be passed by. The
            default always returns False.
        """
        return False

    def names(self) -> list[str]:
        """List the names of all files, for tools that repair. The default has none."""
        return []

    def map(self, name: str) -> memoryview:
        """Map a shard into memory, copied on write. The map stays valid after close.

        The default reads the shard.
        """
        data = memoryview(bytearray(self.size_bytes(name)))
        self.read(name, data, offset=0)
        return data

    def duplicate(self) -> CheckpointFiles:
        """Return the same files, which can be used after these are closed.

        The default returns this object; define it together with `close`.

        Raises:
            StorageError: The files can't be opened again.
        """
        return self

    def close(self) -> None:  # noqa: B027
        """Release what is held. Never raises. The default holds nothing."""
