"""The files of a committed checkpoint on a file system, opened when first needed."""

from __future__ import annotations

import errno
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
from shardckpt.storage.names import beside
from shardckpt.storage.posix import System, translated

__all__ = ["LocalFiles"]

_READ = os.O_RDONLY | os.O_NONBLOCK  # a FIFO in a shard's place must not block
_MOST_OPEN = 64  # shards, with two descriptors each; a process may have 1024, mostly
_PAGE_BYTES = 4096
_MANIFEST_LIMIT_BYTES = 2 << 30


@dataclass(slots=True)
class _Shard:
    """An open shard, and how many are using it; `direct` is its descriptor past the page cache.

    The end of a with block is the end of one use.
    """

    fd: int
    lock: threading.Lock
    direct: int | None = None
    tried: bool = False  # to open `direct`
    users: int = 0

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        with self.lock:
            self.users -= 1


class LocalFiles(CheckpointFiles):
    """A committed checkpoint in a directory.

    Every file is opened below the directory that was opened first, so files of a checkpoint that
    replaces it are never mixed in.
    """

    def __init__(self, system: System, path: str, *, directory: int | None = None) -> None:
        self.path = path
        self._system = system
        self._lock = threading.Lock()
        self._open: dict[str, _Shard] = {}  # the one used last comes last
        self._directory = self._find(os.path.realpath(path)) if directory is None else directory

    def _find(self, path: str) -> int:
        try:
            return self._system.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except NotADirectoryError as error:
            raise NotACheckpointError(
                "There is a file at this path, no checkpoint",
                path=self.path,
                expected="a directory that shardckpt.save wrote",
                actual="a file",
                remedy="give the checkpoint's directory",
            ) from error
        except FileNotFoundError as error:
            # A replacing save that died between its two renames left the old one aside.
            with suppress(OSError):
                return self._system.open(beside(path, "old"), os.O_RDONLY | os.O_DIRECTORY)
            raise CheckpointNotFoundError(
                "There is nothing at this path",
                path=self.path,
                expected="a checkpoint",
                actual="no such file or directory",
                remedy="check the path; a save that did not return leaves nothing",
            ) from error

    def manifest(self) -> bytes:
        """See CheckpointFiles.manifest."""
        with translated(f"{self.path}/{MANIFEST_NAME}"):
            return self._manifest()

    def _manifest(self) -> bytes:
        try:
            fd = self._system.open(MANIFEST_NAME, _READ, dir_fd=self._directory)
        except FileNotFoundError as error:
            now = self._at_path()
            if now != self._system.fstat(self._directory).st_ino:
                raise self._replaced(MANIFEST_NAME, now) from error
            raise NotACheckpointError(
                "This directory is no shardckpt checkpoint",
                path=self.path,
                expected=f"a {MANIFEST_NAME} in it",
                actual=self._contents(),
                remedy="give a directory that shardckpt.save wrote; one of "
                "torch.distributed.checkpoint loads with dcp.load",
            ) from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            self._no_regular_file(MANIFEST_NAME)
        try:
            found = self._system.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                self._no_regular_file(MANIFEST_NAME)
            if found.st_size > _MANIFEST_LIMIT_BYTES:
                raise CorruptionError(
                    "The manifest is too large",
                    path=f"{self.path}/{MANIFEST_NAME}",
                    expected=f"at most {_MANIFEST_LIMIT_BYTES} bytes",
                    actual=f"{found.st_size} bytes",
                    remedy="load another checkpoint",
                )
            data = bytearray(found.st_size)
            self._fill(fd, MANIFEST_NAME, memoryview(data), 0)
            return bytes(data)
        finally:
            self._system.close(fd)

    def _contents(self) -> str:
        names = sorted(self._system.listdir(self._directory))
        if ".metadata" in names:
            return "a checkpoint of torch.distributed.checkpoint"
        return f"{len(names)} files: {', '.join(names[:5])}" if names else "an empty directory"

    def names(self) -> list[str]:
        """The names of all files in the directory, for tools that mend."""
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
            # Nothing but what it takes: a cache full of data has forgotten the code.
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
                raise self._cut(name, offset, len(buffer))
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
                    # No O_DIRECT here after all, or not from where the last read ended; of an error
                    # of the disk, readinto will tell.
                    return False
                if count == 0:
                    raise self._cut(name, offset + done, size_bytes - done)
                done += count
            return True

    def _cut(self, name: str, end: int, missing_bytes: int) -> CorruptionError:
        return CorruptionError(
            "A file ends before its time",
            path=f"{self.path}/{name}",
            expected=f"{missing_bytes} more bytes",
            actual=f"its end at byte {end}",
            remedy="load another checkpoint; `shardckpt verify` lists all damage",
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

    def share(self, name: str, path: str) -> bool:
        """Make `path` a hard link to a shard, or a clone of it where there can be none (too many
        links, another owner, no such thing here); whether it is one. Durable once the directory
        that holds `path` is."""
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
        with suppress(OSError):  # the name may lead to another file than the one opened
            made, held = self._system.stat(path), self._system.fstat(fd)
            if (made.st_dev, made.st_ino) == (held.st_dev, held.st_ino):
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

    def _using(self, name: str) -> _Shard:
        """A shard's file, for a with block; beyond a number those that nobody uses are closed."""
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
        """A descriptor that leaves the page cache alone; None where there is none."""
        with self._lock:
            if not shard.tried:
                shard.tried, shard.direct = True, self._open_direct(name, shard.fd)
            return shard.direct

    def _open_direct(self, name: str, held: int) -> int | None:
        if not hasattr(os, "O_DIRECT"):
            return None
        try:
            fd = self._open_shard(name, os.O_DIRECT)
        except (OSError, CheckpointError):
            return None
        with suppress(OSError):
            opened, other = self._system.fstat(fd), self._system.fstat(held)
            if (opened.st_dev, opened.st_ino) == (other.st_dev, other.st_ino):
                return fd
        with suppress(OSError):
            self._system.close(fd)
        return None

    def _open_shard(self, name: str, flags: int = 0) -> int:
        try:
            fd = self._system.open(name, _READ | flags, dir_fd=self._directory)
        except FileNotFoundError as error:
            self._missing(name, error)
        except OSError as error:
            if error.errno == errno.ELOOP:
                self._no_regular_file(name)
            raise
        try:
            if not stat.S_ISREG(self._system.fstat(fd).st_mode):
                self._no_regular_file(name)
        except BaseException:
            self._system.close(fd)
            raise
        return fd

    def _missing(self, name: str, error: OSError) -> NoReturn:
        now = self._at_path()
        if now != self._system.fstat(self._directory).st_ino:
            raise self._replaced(name, now) from error
        raise CorruptionError(
            "A shard is missing",
            path=f"{self.path}/{name}",
            expected="the file",
            actual="no such file",
            remedy="load another checkpoint; `shardckpt verify` lists all damage in this one",
        ) from error

    def _at_path(self) -> int | None:
        """What stands at the path now, by its inode."""
        with suppress(OSError):
            return self._system.stat(os.path.realpath(self.path)).st_ino
        return None

    def _replaced(self, name: str, now: int | None) -> CheckpointNotFoundError:
        return CheckpointNotFoundError(
            "The checkpoint was replaced or removed while it was being read",
            path=self.path,
            expected=name,
            actual="another checkpoint" if now else "nothing",
            remedy="load again",
        )

    def _no_regular_file(self, name: str) -> NoReturn:
        raise CorruptionError(
            "A file of the checkpoint is no regular file",
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
