"""The base classes of a storage of checkpoints.

A storage of your own subclasses these four classes and defines their abstract methods. All other
methods have defaults, which are correct but may be slow. `shardckpt.testing.StorageTests` tests a
storage. docs/how-to/storage.md shows a complete one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NoReturn

from shardckpt.errors import StateError

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
"""A function that is called with each buffer when it is full."""


class WouldWait(Exception):
    """Raised by CheckpointFiles.readinto if the bytes are not in memory and `wait` is false."""


class Storage(ABC):
    """The base class of storages, which find checkpoints by path. No method is collective.

    A read-only storage defines only `open`. `shardckpt.testing` has tests for new storages.
    `shardckpt.LocalStorage` is the default.

    Example:
        >>> import torch, shardckpt
        >>> storage = shardckpt.LocalStorage()
        >>> isinstance(storage, shardckpt.Storage)
        True
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1", storage=storage)
    """

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
            path: The path of the new checkpoint.
            checkpoint_id: Its id, 32 hex digits that no other checkpoint has.
            overwrite: Replace a checkpoint at the path.

        Returns:
            The transaction, with which rank 0 creates files and commits.

        Raises:
            CheckpointExistsError: The path exists, and `overwrite` is false.
            NotACheckpointError: The path does not hold a checkpoint.
            CheckpointBusyError: Another save to the path is under way.
        """
        self._refuse_writing(path)

    def join(self, path: str, *, token: str) -> WriteTransaction:
        """Join the checkpoint that rank 0 began, on any other rank.

        Args:
            path: The path that rank 0 gave to `begin`.
            token: The token of rank 0's transaction.

        Returns:
            The transaction, with which this rank creates files.

        Raises:
            DirectoryNotSharedError: This rank does not see what rank 0 began.
        """
        self._refuse_writing(path)

    def _refuse_writing(self, path: str) -> NoReturn:
        raise StateError(
            "This storage can't be written to",
            path=path,
            expected="a storage that defines begin and join",
            actual=type(self).__qualname__,
            remedy="save to a LocalStorage",
        )


class WriteTransaction(ABC):
    """A checkpoint that is being written, on one rank.

    Attributes:
        path: The path of the new checkpoint.
        token: The text with which other ranks join.
    """

    path: str
    token: str

    @abstractmethod
    def create(self, name: str, *, size_bytes: int, shared: bool = False) -> WritableFile:
        """Create a file in the checkpoint.

        Args:
            name: The file's name. Only a shared file may exist already.
            size_bytes: The final size of the file. The storage may allocate it in advance.
            shared: Several ranks create this file, and each rank writes its own range of it. A
                range begins at a multiple of 1 MiB, and ends at another one or at the end.

        Returns:
            The file, open for writing.

        Raises:
            StorageError: The file exists, or there is not enough space.
        """

    @abstractmethod
    def commit(self, manifest: bytes) -> None:
        """Write the manifest, and make the whole checkpoint visible in one step, on rank 0 alone.

        The checkpoint is durable when this returns.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Remove the written files, as far as possible. Never raises.

        After commit, and when called again, it does nothing.
        """

    def link(self, name: str, source: CheckpointFiles) -> bool:
        """Add a file of an earlier checkpoint without copying its bytes, durably, on any rank.

        The new file must stay intact when the source is replaced or removed.

        Returns:
            Whether the file was added. If not, nothing was made, and the caller creates the file.
            The default always returns False.
        """
        return False

    def close(self) -> None:  # noqa: B027
        """Release locks and other resources. Never raises. The default does nothing."""


class WritableFile(ABC):
    """A file that is being written.

    Attributes:
        direct: Whether addresses of buffers, offsets and lengths must be multiples of 4096 bytes.
    """

    direct: bool = False

    @abstractmethod
    def write(self, data: memoryview, *, offset: int) -> None:
        """Write all of `data` at `offset`. Called from any thread; should release the GIL."""

    @abstractmethod
    def close(self, *, size_bytes: int) -> None:
        """Truncate the file to its size, make it durable, and close it.

        Raises:
            StorageError: The bytes may not be durable.
        """

    def discard(self) -> None:  # noqa: B027
        """Close the file after an error. Never raises. The default does nothing."""


class CheckpointFiles(ABC):
    """The files of a committed checkpoint.

    Attributes:
        path: The path of the checkpoint.
        in_memory: Whether reads never wait for a disk or another machine.
    """

    path: str
    in_memory: bool = False

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
        """Fill a buffer with the bytes of a shard from `offset` on. Called from any thread.

        Raises:
            CorruptionError: The shard is missing or truncated.
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
        """Fill several buffers with consecutive bytes of a shard. Called from any thread.

        Args:
            name: The shard.
            buffers: The buffers.
            offset: The offset of the first byte in the shard.
            on_filled: Called with each buffer as soon as it is full, while its bytes are in the
                processor's cache.
            wait: Whether the read may wait for a disk or another machine. If false, it raises
                WouldWait instead. The default raises it unless `in_memory`.

        Raises:
            WouldWait: `wait` is false, and the bytes are not in memory.
            CorruptionError: The shard is missing or truncated.
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
        """Fill the beginning of a buffer, bypassing the page cache. Called from any thread.

        Args:
            name: The shard.
            buffer: A buffer whose address is a multiple of 4096. Its size is at least `size_bytes`
                rounded up to a multiple of 4096.
            offset: The offset of the first byte in the shard, a multiple of 4096.
            size_bytes: The number of bytes to read.

        Returns:
            Whether the bytes were read. False if the page cache has them or can't be bypassed. The
            default always returns False.
        """
        return False

    def map(self, name: str) -> memoryview:
        """Map a shard into private memory. The map stays valid after close.

        The default reads the shard.
        """
        data = memoryview(bytearray(self.size_bytes(name)))
        self.read(name, data, offset=0)
        return data

    def duplicate(self) -> CheckpointFiles:
        """Return another object for the same files, which stays open when this one is closed.

        The default returns this object. Define it if you define `close`.

        Raises:
            StorageError: The files can't be opened again.
        """
        return self

    def close(self) -> None:  # noqa: B027
        """Close the files. Never raises. The default does nothing."""
