"""The base classes of a storage of checkpoints.

A storage of your own subclasses these four classes and defines their abstract methods. All other
methods have defaults, which are correct but may be slow. `shardckpt.testing.StorageTests` tests a
storage. docs/how-to/storage.md shows a complete one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from shardckpt.errors import CheckpointNotFoundError, StateError

__all__ = [
    "MANIFEST_NAME",
    "PARTS_NOTE",
    "CheckpointFiles",
    "OnFilled",
    "Storage",
    "WouldWait",
    "WritableFile",
    "WriteTransaction",
]

MANIFEST_NAME = "manifest.json"

PARTS_NOTE = "parts"
"""The title of the note in the manifest of a checkpoint whose shards were written in parts: by each
machine in a storage of its own."""

OnFilled = Callable[[memoryview], object]
"""A function that is called with each buffer when it is full."""


class WouldWait(Exception):
    """Raised by CheckpointFiles.readinto if the bytes are not in memory and `wait` is false."""


class Storage(ABC):
    """The base class of storages, which find checkpoints by path. No method is collective.

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

    Attributes:
        in_parts: Whether each machine may hold a part of a checkpoint, which the others can't read.
    """

    in_parts: bool = False

    def full_path(self, path: str) -> str:
        """Return the path in full: the text by which reports and errors name it.

        Calling it with its own result changes nothing. The default returns the path.

        Args:
            path: A path that a user gave.

        Returns:
            The full path.

        Raises:
            StateError: The path is invalid in this storage.
        """
        if not path:
            raise StateError("Invalid path", expected="a non-empty text", actual=repr(path))
        return path

    def child(self, folder: str, name: str) -> str:
        """Return the path of a name in a folder. The default joins them with `/`.

        Args:
            folder: The full path of the folder.
            name: The name, without `/`.

        Returns:
            The full path of the name.
        """
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

    def open_newest(self, path: str) -> CheckpointFiles:
        """Open a committed checkpoint for a load, on one rank.

        A storage with several places may have different checkpoints at a path. Then this is the
        newest one, and `open` may return another one, with less work. The default calls `open`.

        Args:
            path: The checkpoint.

        Returns:
            Its files.

        Raises:
            CheckpointError: See `open`.
        """
        return self.open(path)

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

    def join_part(self, path: str, *, token: str) -> WriteTransaction:
        """Join as `join` does, or begin this machine's part of the checkpoint.

        The default joins. A storage with `in_parts` returns a transaction with `commits_part` on
        one rank of each machine that does not see what rank 0 began.

        Args:
            path: The path that rank 0 gave to `begin`.
            token: The token of rank 0's transaction.

        Returns:
            The transaction, with which this rank creates files.

        Raises:
            DirectoryNotSharedError: This rank can do neither.
        """
        return self.join(path, token=token)

    def assemble(self, path: str, *, checkpoint_id: str, overwrite: bool) -> WriteTransaction:
        """Begin a checkpoint that several processes write at any time, or go on with it.

        Each of them creates files, and commits if `has` finds all files. The default begins a
        checkpoint that one process writes.

        Args:
            path: The path of the checkpoint.
            checkpoint_id: Its id, the same in all processes.
            overwrite: Replace a checkpoint at the path.

        Returns:
            The transaction. If it `resumes`, several processes may write the checkpoint. Then
            `abandon` leaves the files, as other processes go on with them.

        Raises:
            CheckpointExistsError: The path exists, and `overwrite` is false.
            NotACheckpointError: The path does not hold a checkpoint.
            CheckpointBusyError: Another process commits the checkpoint, or saves to the path.
        """
        return self.begin(path, checkpoint_id=checkpoint_id, overwrite=overwrite)

    def open_part(self, path: str, manifest: bytes) -> CheckpointFiles:
        """Open this machine's part of a checkpoint, whose manifest another rank has read.

        Called only if `in_parts`.

        Args:
            path: The checkpoint.
            manifest: The manifest.

        Returns:
            Its files. Some may be missing.
        """
        return self.open(path)

    def remove_part(self, path: str) -> None:  # noqa: B027
        """Remove this machine's part of a checkpoint that rank 0 has removed, on any other rank.

        Never raises StorageError. The default has no parts.

        Args:
            path: The checkpoint.
        """

    def names(self, folder: str) -> list[str]:
        """List the names in a folder that may be checkpoints, sorted; none in a missing folder.

        Names that lead to another name in the folder are left out.

        Args:
            folder: The full path of the folder.

        Returns:
            The names.

        Raises:
            StorageError: The folder can't be read.
        """
        self._refuse("This storage can't list a folder", folder, "a storage that defines names")

    def exists(self, path: str) -> bool:
        """Ask whether there is something at a path. The default opens it as a checkpoint.

        Args:
            path: The path.

        Returns:
            True if a save to the path would replace something.
        """
        try:
            self.open(path).close()
        except CheckpointNotFoundError:
            return False
        return True

    def version(self, path: str) -> Hashable:
        """Return a value that changes when the checkpoint at the path is replaced.

        The default reads the manifest.

        Args:
            path: The checkpoint.

        Returns:
            The value.

        Raises:
            CheckpointError: The path does not lead to a checkpoint.
        """
        files = self.open(path)
        try:
            return hashlib.sha256(files.manifest()).digest()
        finally:
            files.close()

    def remove(self, path: str) -> None:
        """Remove a checkpoint: all at once from its path, then its files as far as that works.

        Args:
            path: The checkpoint.

        Raises:
            CheckpointBusyError: A save to the path is under way.
            StorageError: The checkpoint is not removed.
        """
        self._refuse("This storage can't remove", path, "a storage that defines remove")

    def tiers(self, path: str) -> dict[str, str]:
        """Describe the places that hold a checkpoint, if this storage has several.

        Args:
            path: The checkpoint.

        Returns:
            The path in each place, with "durable", "pending" or "missing". Empty by default.
        """
        return {}

    def wait_for_tier(self, path: str, tier: int, timeout: float | None = None) -> None:  # noqa: B027
        """Wait until a tier holds a checkpoint. The default has one tier, which holds it.

        Args:
            path: The checkpoint.
            tier: The number of the tier, from 0.
            timeout: Seconds to wait; None waits without a limit.

        Raises:
            TimeoutError: The tier does not hold it in time.
        """

    def sweep(self, folder: str) -> None:  # noqa: B027
        """Remove what dead saves and removals left in a folder, as far as that works.

        Never raises OSError. The default leaves everything.

        Args:
            folder: The full path of the folder.
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
    """A checkpoint that is being written, on one rank.

    Attributes:
        path: The path of the new checkpoint.
        token: The text with which other ranks join.
        shares_files: Several ranks can write parts of one file; see `create`.
        resumes: Files that were closed may stay after an error: a later transaction with the same
            id has them.
        commits_part: This rank writes to a place that rank 0's commit does not reach. It commits
            there, with rank 0's manifest, before rank 0 does. See Storage.join_part.
        tiers: The state of the checkpoint in each place when it is committed, see Storage.tiers.
    """

    path: str
    token: str
    shares_files: bool = True
    resumes: bool = False
    commits_part: bool = False
    tiers: Mapping[str, str] = MappingProxyType({})

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

        The checkpoint is durable when this returns. The manifest begins with
        `{"format":"shardckpt","version":1,"id":"ID"`, with the id of `begin`.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Remove the written files, as far as possible. Never raises.

        After commit, and when called again, it does nothing.
        """

    def has(self, name: str, *, size_bytes: int) -> bool:
        """Ask whether an earlier transaction with the same id has written a file of this size.

        The default is False. If True, the file is part of this transaction.
        """
        return False

    def link(self, name: str, source: CheckpointFiles) -> bool:
        """Add a file of an earlier checkpoint without copying its bytes, durably, on any rank.

        The new file must stay intact when the source is replaced or removed.

        Returns:
            Whether the file was added. If not, nothing was made, and the caller creates the file.
            The default always returns False.
        """
        return False

    def create_from(
        self, name: str, source: CheckpointFiles, *, size_bytes: int
    ) -> WritableFile | None:
        """Create a file that may take over ranges of a file of an earlier checkpoint, on any rank.

        See WritableFile.clone. The new file must stay intact when the source is replaced or
        removed.

        Args:
            name: The name of both files.
            source: The files of the earlier checkpoint.
            size_bytes: The final size of the file.

        Returns:
            The file, open for writing. None if the storage can't take over ranges: nothing was
            made, and the caller creates the file. The default always returns None.

        Raises:
            StorageError: The file exists.
        """
        return None

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

    def clone(self, *, offset: int, size_bytes: int) -> bool:
        """Take over a range of the file that `create_from` was given, without writing its bytes.

        Called from any thread, in place of a write.

        Args:
            offset: The offset of the range in both files, a multiple of 1 MiB.
            size_bytes: The size of the range: a multiple of 1 MiB, or up to the end of both files.

        Returns:
            Whether the file has the range. If not, the caller writes it. The default always returns
            False.
        """
        return False

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

    def names(self) -> list[str]:
        """List the names of all files, for tools that repair. The default has none."""
        return []

    def copies(self) -> Sequence[CheckpointFiles]:
        """Return the same checkpoint in other places, nearest first, to read a block that is
        corrupted here. The default has none."""
        return ()

    def elsewhere(self, name: str) -> bool:
        """Ask whether a shard is still on another machine, out of reach. The default is False."""
        return False

    def nearby(self) -> Sequence[str] | None:
        """List the shards on a disk of this machine alone. The default, None, says that all
        machines read from the same place."""
        return None

    def count_verified(self, size_bytes: int) -> None:  # noqa: B027
        """Take note of bytes that were read from this copy and verified; from any thread."""

    def bytes_read(self) -> dict[str, int]:
        """Return the bytes read so far by place, if there are several places."""
        return {}

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
