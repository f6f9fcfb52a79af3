"""A disk in memory behind the seam of system calls; see crash_states for what a crash leaves of it.

A change reaches the disk for certain once its file, or the directory that holds the name, is
fsynced; until then any part of the changes may have reached it, in any order, writes torn at
sectors included. Changes of names in one call (rename, exchange) are atomic. An fsync of a file
says nothing of its name. This is less than any journalling file system grants.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from shardckpt.storage.posix import System

SECTOR_BYTES = 512
ROOT = 1


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a directory that now lead to other inodes, or (None) to none: at once."""

    inode: int
    changes: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, slots=True)
class Data:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Size:
    inode: int
    size_bytes: int
    grow: bool


@dataclass(frozen=True, slots=True)
class Sync:
    inode: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that the test wants to remember: where a save began or was acknowledged."""

    kind: str
    version: int


Change = Names | Data | Size
Entry = Change | Sync | Mark


class ProcessDied(BaseException):
    """Raised by every system call of a process that has been killed."""


@dataclass(slots=True)
class Content:
    """Directories and files by inode."""

    directories: dict[int, dict[str, int]]
    files: dict[int, bytes]

    def copy(self) -> Content:
        return Content({k: dict(v) for k, v in self.directories.items()}, dict(self.files))

    def apply(self, change: Change) -> None:
        if isinstance(change, Names):
            names = self.directories.setdefault(change.inode, {})
            for name, inode in change.changes:
                if inode is None:
                    names.pop(name, None)
                else:
                    names[name] = inode
            return
        data = bytearray(self.files.get(change.inode, b""))
        if isinstance(change, Size):
            if len(data) < change.size_bytes:
                data += bytes(change.size_bytes - len(data))
            elif not change.grow:
                del data[change.size_bytes :]
        else:
            end = change.offset + len(change.data)
            data += bytes(max(0, change.offset - len(data)))
            data[change.offset : end] = change.data
        self.files[change.inode] = bytes(data)


class Disk(System):
    """A System over memory, which logs what it does. `can_exchange`: whether it can swap names;
    `in_cache`: whether all files are in the page cache. `past_cache` counts the reads past it."""

    def __init__(
        self,
        content: Content | None = None,
        *,
        can_exchange: bool = True,
        in_cache: bool = False,
    ) -> None:
        self.can_exchange = can_exchange
        self.in_cache = in_cache
        self.past_cache = 0
        self.direct_ones: set[int] = set()
        self.content = content or Content({ROOT: {}}, {})
        self.kinds = dict.fromkeys(self.content.directories, stat.S_IFDIR)
        self.base = self.content.copy()
        self.log: list[Entry] = []
        self.settled = 0  # up to which entry of the log all has reached the disk
        self.inodes = itertools.count(1 + max([*self.content.directories, *self.content.files]))
        self.descriptors: dict[int, int] = {}
        self.numbers = itertools.count(1000)
        self.locked: dict[int, int] = {}
        self.lock_ = threading.RLock()
        self.calls = 0
        self.die_at: int | None = None
        self.fail_at: tuple[int, int] | None = None
        self.fail_for_ever = False

    # The calls of tests.

    def mark(self, kind: str, version: int) -> None:
        with self.lock_:
            self.log.append(Mark(kind, version))

    def settle(self) -> None:
        """All reaches the disk."""
        self.base = self.content.copy()
        self.log = [entry for entry in self.log if isinstance(entry, Mark)]
        self.settled = len(self.log)

    def restart(self) -> None:
        """The process has died and another one goes on; the machine has not crashed."""
        self.descriptors, self.locked, self.die_at, self.fail_at = {}, {}, None, None

    # The common parts of the calls.

    def _call(self) -> None:
        self.calls += 1
        if self.die_at is not None and self.calls >= self.die_at:
            raise ProcessDied
        if self.fail_at is not None:
            at, code = self.fail_at
            if self.calls == at or (self.calls > at and self.fail_for_ever):
                raise OSError(code, os.strerror(code))

    def _change(self, change: Change) -> None:
        self.content.apply(change)
        self.log.append(change)

    def _inode(self, path: str, at: int = ROOT) -> int:
        for part in path.split("/"):
            if part:
                if at not in self.content.directories:
                    raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
                if part not in self.content.directories[at]:
                    raise FileNotFoundError(errno.ENOENT, "No such file", path)
                at = self.content.directories[at][part]
        return at

    def _place(self, path: str) -> tuple[int, str]:
        parent, name = os.path.split(path)
        return self._inode(parent), name

    def _stat(self, inode: int) -> os.stat_result:
        directory = inode in self.content.directories
        size = 0 if directory else len(self.content.files[inode])
        mode = (stat.S_IFDIR if directory else stat.S_IFREG) | 0o755
        return os.stat_result((mode, inode, 1, 1, 0, 0, size, 0, 0, 0))

    def _free(self, path: str) -> tuple[int, str]:
        directory, name = self._place(path)
        if name in self.content.directories[directory]:
            raise FileExistsError(errno.EEXIST, "File exists", path)
        return directory, name

    def _check_aligned(self, fd: int, offset: int, buffers: Sequence[memoryview]) -> None:
        if fd in self.direct_ones and any(n % 4096 for n in (offset, *map(len, buffers))):
            raise OSError(errno.EINVAL, "O_DIRECT takes multiples of 4096")

    # The calls.

    def open(self, path: str, flags: int, *, dir_fd: int | None = None) -> int:
        with self.lock_:
            self._call()
            at = ROOT if dir_fd is None else self.descriptors[dir_fd]
            try:
                inode = self._inode(path, at)
                if flags & os.O_EXCL:
                    raise FileExistsError(errno.EEXIST, "File exists", path)
            except FileNotFoundError:
                if not flags & os.O_CREAT:
                    raise
                directory, name = self._place(path)
                inode = next(self.inodes)
                self.content.files[inode] = b""
                self._change(Names(directory, ((name, inode),)))
            if flags & os.O_DIRECTORY and inode not in self.content.directories:
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
            number = next(self.numbers)
            self.descriptors[number] = inode
            if flags & os.O_DIRECT:
                self.direct_ones.add(number)
            return number

    def close(self, fd: int) -> None:
        with self.lock_:
            self.locked = {k: v for k, v in self.locked.items() if v != fd}
            del self.descriptors[fd]
            self.direct_ones.discard(fd)
            self._call()  # Linux closes a descriptor even where it reports an error

    def write(self, fd: int, data: memoryview, *, offset: int) -> int:
        with self.lock_:
            self._call()
            self._check_aligned(fd, offset, [data])
            self._change(Data(self.descriptors[fd], offset, bytes(data)))
            return len(data)

    def read(
        self, fd: int, buffers: Sequence[memoryview], *, offset: int, wait: bool = True
    ) -> int:
        with self.lock_:
            self._call()
            if not (wait or self.in_cache):
                raise OSError(errno.EAGAIN, "not in the page cache")
            self._check_aligned(fd, offset, buffers)
            self.past_cache += fd in self.direct_ones
            data = self.content.files[self.descriptors[fd]]
        start = offset
        for buffer in buffers:
            part = data[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            offset += len(part)
        return offset - start

    def allocate(self, fd: int, *, size_bytes: int) -> None:
        with self.lock_:
            self._call()
            self._change(Size(self.descriptors[fd], size_bytes, True))

    def truncate(self, fd: int, *, size_bytes: int) -> None:
        with self.lock_:
            self._call()
            self._change(Size(self.descriptors[fd], size_bytes, False))

    def cached(self, fd: int, *, offset: int, size_bytes: int) -> bool:
        self._call()
        return self.in_cache

    def direct(self, fd: int, *, on: bool) -> None:
        self._call()
        (self.direct_ones.add if on else self.direct_ones.discard)(fd)

    def fsync(self, fd: int) -> None:
        with self.lock_:
            self._call()
            self.log.append(Sync(self.descriptors[fd]))

    def lock(self, fd: int) -> None:
        with self.lock_:
            self._call()
            if self.descriptors[fd] in self.locked:
                raise BlockingIOError(errno.EAGAIN, "locked")
            self.locked[self.descriptors[fd]] = fd

    def unlock(self, fd: int) -> None:
        with self.lock_:
            self.locked.pop(self.descriptors[fd], None)

    def map(self, fd: int, *, size_bytes: int) -> memoryview:
        memory = memoryview(bytearray(size_bytes))
        self.read(fd, [memory], offset=0)
        return memory

    def dup(self, fd: int) -> int:
        with self.lock_:
            self._call()
            other = next(self.numbers)
            self.descriptors[other] = self.descriptors[fd]
            return other

    def mkdir(self, path: str) -> None:
        with self.lock_:
            self._call()
            directory, name = self._free(path)
            inode = next(self.inodes)
            self.content.directories[inode] = {}
            self._change(Names(directory, ((name, inode),)))

    def rename(self, source: str, target: str) -> None:
        with self.lock_:
            self._call()
            (directory, old), (other, new) = self._place(source), self._place(target)
            assert directory == other, "only renames within one directory are atomic here"
            inode = self._inode(source)
            taken = self.content.directories[directory].get(new)
            if taken is not None and self.content.directories.get(taken):
                raise OSError(errno.ENOTEMPTY, "Directory not empty", target)
            self._change(Names(directory, ((old, None), (new, inode))))

    def exchange(self, one: str, other: str) -> None:
        with self.lock_:
            self._call()
            if not self.can_exchange:
                raise OSError(errno.EINVAL, "no exchange here", one)
            (directory, first), (_, second) = self._place(one), self._place(other)
            swapped = (first, self._inode(other)), (second, self._inode(one))
            self._change(Names(directory, swapped))

    def link(self, name: str, target: str, *, dir_fd: int) -> None:
        with self.lock_:
            self._call()
            inode = self._inode(name, self.descriptors[dir_fd])
            directory, new = self._free(target)
            self._change(Names(directory, ((new, inode),)))

    def clone(
        self, source_fd: int, target_fd: int, *, offset: int = 0, size_bytes: int = 0
    ) -> None:
        with self.lock_:
            self._call()
            data = self.content.files[self.descriptors[source_fd]]
            end = offset + size_bytes if size_bytes else len(data)
            if end > len(data):
                raise OSError(errno.EINVAL, "the range ends behind the file")
            self._change(Data(self.descriptors[target_fd], offset, data[offset:end]))

    def unlink(self, path: str) -> None:
        with self.lock_:
            self._call()
            if self._inode(path) in self.content.directories:
                raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
            directory, name = self._place(path)
            self._change(Names(directory, ((name, None),)))

    def rmdir(self, path: str) -> None:
        with self.lock_:
            self._call()
            if self.content.directories[self._inode(path)]:
                raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
            directory, name = self._place(path)
            self._change(Names(directory, ((name, None),)))

    def listdir(self, path: str | int) -> list[str]:
        with self.lock_:
            self._call()
            inode = self.descriptors[path] if isinstance(path, int) else self._inode(path)
            if inode not in self.content.directories:
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
            return list(self.content.directories[inode])

    def stat(self, path: str) -> os.stat_result:
        with self.lock_:
            self._call()
            return self._stat(self._inode(path))

    def fstat(self, fd: int) -> os.stat_result:
        with self.lock_:
            self._call()
            return self._stat(self.descriptors[fd])
