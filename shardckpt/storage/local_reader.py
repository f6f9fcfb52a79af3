"""The files of a committed checkpoint on a file system, opened when first needed."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from shardckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    NotACheckpointError,
)
from shardckpt.storage.base import MANIFEST_NAME, CheckpointFiles, OnFilled, WouldWait
from shardckpt.storage.names import hidden_path
from shardckpt.storage.posix import System, translated

__all__ = ["LocalFiles"]

_READ = os.O_RDONLY | os.O_NONBLOCK  # a FIFO in a shard's place must not block
_MOST_OPEN = 64  # shards, with two descriptors each; the usual limit of a process is 1024
_PAGE_BYTES = 4096
_MANIFEST_LIMIT_BYTES = 2 << 30


@dataclass(slots=True)
class _Shard:
    """An open shard. A with block ends one use of it.

    Attributes:
        fd: Its descriptor.
        lock: Guards the other attributes.
        direct: Its descriptor with O_DIRECT. None if it is not open.
        tried_direct: Whether an attempt was made to open `direct`.
        users: The number of running reads.
    """

    fd: int
    lock: threading.Lock
    direct: int | None = None
    tried_direct: bool = False
    users: int = 0

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.users -= 1


class LocalFiles(CheckpointFiles):
    """A committed checkpoint in a directory; see CheckpointFiles.

    All files are opened relative to one open directory. If another checkpoint replaces this one,
    the files of the two are never mixed.
    """

    def __init__(self, system: System, path: str, *, directory: int | None = None) -> None:
        self.path = path
        self._system = system
        self._lock = threading.Lock()
        self._open: dict[str, _Shard] = {}  # sorted by the time of the last use
        if directory is None:
            directory = self._open_directory(os.path.realpath(path))
        self._directory = directory

    def _open_directory(self, path: str) -> int:
        try:
            return self._system.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except NotADirectoryError as error:
            raise NotACheckpointError(
                "The path is a file, not the directory of a checkpoint",
                path=self.path,
                expected="a directory that shardckpt.save wrote",
                actual="a file",
                remedy="pass the directory of the checkpoint; `shardckpt convert` reads files of "
                "torch, safetensors and other formats",
            ) from error
        except FileNotFoundError as error:
            # A save that died between its two renames left the old checkpoint under this name.
            with suppress(OSError):
                return self._system.open(hidden_path(path, "old"), os.O_RDONLY | os.O_DIRECTORY)
            raise CheckpointNotFoundError(
                "The checkpoint does not exist",
                path=self.path,
                expected="a checkpoint",
                actual="no such file or directory",
                remedy="check the path, and whether the save to it has succeeded",
            ) from error

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        with translated(f"{self.path}/{MANIFEST_NAME}"):
            return self._manifest()

    def _manifest(self) -> bytes:
        try:
            fd = self._system.open(MANIFEST_NAME, _READ, dir_fd=self._directory)
        except FileNotFoundError as error:
            self._raise_if_replaced(MANIFEST_NAME, error)
            raise NotACheckpointError(
                "This directory is not a shardckpt checkpoint",
                path=self.path,
                expected=f"a {MANIFEST_NAME} in it",
                actual=self._contents(),
                remedy="pass a directory that shardckpt.save wrote; `shardckpt convert` reads "
                "checkpoints of other libraries",
            ) from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            self._refuse_irregular(MANIFEST_NAME)
        try:
            status = self._system.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                self._refuse_irregular(MANIFEST_NAME)
            if status.st_size > _MANIFEST_LIMIT_BYTES:
                raise CorruptionError(
                    "The manifest is too large",
                    path=f"{self.path}/{MANIFEST_NAME}",
                    expected=f"at most {_MANIFEST_LIMIT_BYTES} bytes",
                    actual=f"{status.st_size} bytes",
                    remedy="load another checkpoint",
                )
            data = io.BytesIO(bytes(status.st_size))  # its bytes are returned without a copy
            with data.getbuffer() as view:
                self._fill(fd, MANIFEST_NAME, view, 0)
            return data.getvalue()
        finally:
            self._system.close(fd)

    def _contents(self) -> str:
        names = sorted(self._system.listdir(self._directory))
        if ".metadata" in names:
            return "a checkpoint of torch.distributed.checkpoint"
        return f"a directory with {', '.join(names[:5])}" if names else "an empty directory"

    def names(self) -> list[str]:
        """List the names of all files in the directory, for rescues."""
        with translated(self.path):
            return self._system.listdir(self._directory)

    def size_bytes(self, name: str) -> int:
        """See CheckpointFiles.size_bytes."""
        with translated(f"{self.path}/{name}"), self._using(name) as shard:
            return self._system.fstat(shard.fd).st_size

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        """See CheckpointFiles.read."""
        self.readinto(name, [buffer], offset=offset)

    def readinto(
        self,
        name: str,
        buffers: Sequence[memoryview],
        *,
        offset: int,
        on_filled: OnFilled = lambda buffer: None,
        wait: bool = True,
    ) -> None:
        """See CheckpointFiles.readinto."""
        with translated(f"{self.path}/{name}"), self._using(name) as shard:
            # This loop is kept short, as the data has evicted the code from the processor's cache.
            for buffer in buffers:
                self._fill(shard.fd, name, buffer, offset, wait)
                offset += len(buffer)
                on_filled(buffer)

    def _fill(self, fd: int, name: str, buffer: memoryview, offset: int, wait: bool = True) -> None:
        while buffer:
            try:
                count = self._system.read(fd, [buffer], offset=offset, wait=wait)
            except OSError as error:
                if wait:
                    raise
                raise WouldWait(name) from error
            if count == 0:
                raise self._truncated(name, offset, len(buffer))
            buffer, offset = buffer[count:], offset + count

    def read_past_cache(
        self, name: str, buffer: memoryview, *, offset: int, size_bytes: int
    ) -> bool:
        """See CheckpointFiles.read_past_cache."""
        with translated(f"{self.path}/{name}"), self._using(name) as shard:
            fd = self._past_cache(name, shard)
            if fd is None or self._system.cached(fd, offset=offset, size_bytes=size_bytes):
                return False
            room, done = size_bytes + -size_bytes % _PAGE_BYTES, 0
            while done < size_bytes:
                try:
                    count = self._system.read(fd, [buffer[done:room]], offset=offset + done)
                except OSError:
                    # O_DIRECT is not possible here, or not at the offset where the last read ended.
                    # If the disk has an error, the readinto that follows raises it.
                    return False
                if count == 0:
                    raise self._truncated(name, offset + done, size_bytes - done)
                done += count
            return True

    def _truncated(self, name: str, end: int, missing_bytes: int) -> CorruptionError:
        return CorruptionError(
            "A file is truncated",
            path=f"{self.path}/{name}",
            expected=f"{missing_bytes} more bytes",
            actual=f"the file ends at byte {end}",
            remedy="load another checkpoint; `shardckpt verify` lists all corrupted files",
        )

    def map(self, name: str) -> memoryview:
        """See CheckpointFiles.map."""
        with translated(f"{self.path}/{name}"), self._using(name) as shard:
            size_bytes = self._system.fstat(shard.fd).st_size
            return self._system.map(shard.fd, size_bytes=size_bytes)

    def duplicate(self) -> LocalFiles:
        """See CheckpointFiles.duplicate."""
        with translated(self.path):
            directory = self._system.dup(self._directory)
        return LocalFiles(self._system, self.path, directory=directory)

    def link_or_clone(self, name: str, path: str) -> bool:
        """Make `path` a hard link to a shard. If the file system refuses, clone the shard.

        The new file is durable when its directory is.

        Returns:
            Whether the file was made.
        """
        try:
            with self._using(name) as shard:
                return self._link(name, shard.fd, path) or self._clone(shard.fd, path)
        except (OSError, CheckpointError):
            return False

    def _link(self, name: str, fd: int, path: str) -> bool:
        try:
            self._system.link(name, path, dir_fd=self._directory)
        except OSError:
            return False
        with suppress(OSError):  # the name may have been given to another file
            if os.path.samestat(self._system.stat(path), self._system.fstat(fd)):
                return True
        with suppress(OSError):
            self._system.unlink(path)
        return False

    def _clone(self, fd: int, path: str) -> bool:
        try:
            target = self._system.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except OSError:
            return False
        try:
            self._system.clone(fd, target)
            self._system.fsync(target)
            return True
        except OSError:
            with suppress(OSError):
                self._system.unlink(path)
            return False
        finally:
            with suppress(OSError):
                self._system.close(target)

    def clone_range(self, name: str, target_fd: int, *, offset: int, size_bytes: int) -> bool:
        """Share a range of a shard with an open file, at the same offset. Returns whether that
        worked: the file system must support it, and hold both files."""
        try:
            with self._using(name) as shard:
                self._system.clone(shard.fd, target_fd, offset=offset, size_bytes=size_bytes)
            return True
        except (OSError, CheckpointError):
            return False

    def _using(self, name: str) -> _Shard:
        """Open a shard for a with block. Closes shards that are not in use above a limit."""
        with self._lock:
            shard = self._open.pop(name, None) or _Shard(self._open_shard(name), self._lock)
            self._open[name] = shard
            shard.users += 1
            if (surplus := len(self._open) - _MOST_OPEN) > 0:
                idle = [other for other, one in self._open.items() if not one.users]
                for other in idle[:surplus]:
                    self._close_shard(self._open.pop(other))
        return shard

    def _past_cache(self, name: str, shard: _Shard) -> int | None:
        """Return the descriptor of a shard with O_DIRECT. None if that is not possible."""
        with self._lock:
            if not shard.tried_direct:
                shard.tried_direct, shard.direct = True, self._open_direct(name, shard.fd)
            return shard.direct

    def _open_direct(self, name: str, buffered_fd: int) -> int | None:
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            fd = self._open_shard(name, os.O_DIRECT)
        except (OSError, CheckpointError):
            return None
        with suppress(OSError):
            if os.path.samestat(self._system.fstat(fd), self._system.fstat(buffered_fd)):
                return fd
        with suppress(OSError):
            self._system.close(fd)
        return None

    def _open_shard(self, name: str, flags: int = 0) -> int:
        try:
            fd = self._system.open(name, _READ | flags, dir_fd=self._directory)
        except FileNotFoundError as error:
            self._refuse_missing(name, error)
        except OSError as error:
            if error.errno == errno.ELOOP:
                self._refuse_irregular(name)
            raise
        try:
            if not stat.S_ISREG(self._system.fstat(fd).st_mode):
                self._refuse_irregular(name)
        except BaseException:
            self._system.close(fd)
            raise
        return fd

    def _refuse_missing(self, name: str, error: OSError) -> NoReturn:
        self._raise_if_replaced(name, error)
        raise CorruptionError(
            "A shard is missing",
            path=f"{self.path}/{name}",
            expected="the file",
            actual="no such file",
            remedy="load another checkpoint; `shardckpt verify` lists all corrupted files",
        ) from error

    def _raise_if_replaced(self, name: str, error: OSError) -> None:
        """Raise CheckpointNotFoundError if the path no longer leads to the open directory."""
        inode = None
        with suppress(OSError):  # the path no longer exists
            inode = self._system.stat(os.path.realpath(self.path)).st_ino
        if inode != self._system.fstat(self._directory).st_ino:
            raise CheckpointNotFoundError(
                "The checkpoint was replaced or removed while it was being read",
                path=self.path,
                expected=name,
                actual="another checkpoint" if inode else "no checkpoint",
                remedy="load again",
            ) from error

    def _refuse_irregular(self, name: str) -> NoReturn:
        raise CorruptionError(
            "A file of the checkpoint is not a regular file",
            path=f"{self.path}/{name}",
            expected="a regular file",
            actual="a link, pipe, device or directory",
            remedy="don't trust this checkpoint; load another one",
        )

    def close(self) -> None:
        """See CheckpointFiles.close."""
        with self._lock:
            shards, self._open = self._open, {}
            directory, self._directory = self._directory, -1
        for shard in shards.values():
            self._close_shard(shard)
        if directory >= 0:
            with suppress(OSError):
                self._system.close(directory)

    def _close_shard(self, shard: _Shard) -> None:
        for fd in (shard.fd, shard.direct):
            if fd is not None:
                with suppress(OSError):
                    self._system.close(fd)
