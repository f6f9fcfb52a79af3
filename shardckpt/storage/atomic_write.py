"""Files and folders that appear under their name at once, when they are durable.

A write to NAME keeps these beside its target, HASH being a digest of NAME (32 hex digits):

    .shardckpt-HASH.lock        locked while the write is alive; holds MARK and NAME
    .shardckpt-HASH.ID.part     what is being written, ID being new (32 hex digits); once the names
                                are exchanged, what has been replaced
    .shardckpt-HASH.old         a replaced folder, where the file system can't exchange names

The lock file is durable before the others are made, and goes after them. So whatever carries such
a name without a lock file that holds MARK belongs to someone else, and is never touched; and what
has a lock file that nobody locks was left by a process that died. Every write collects those in
its folder. docs/durability.md tells each step.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from shardckpt.errors import (
    CheckpointBusyError,
    CheckpointExistsError,
    NotACheckpointError,
    StorageError,
)
from shardckpt.storage.deletion import exists, make_directories, remove_files, sync_directory
from shardckpt.storage.local import LocalFile
from shardckpt.storage.lock import Lock
from shardckpt.storage.names import beside_file, is_beside_file
from shardckpt.storage.posix import UNSUPPORTED, System, translated

__all__ = ["AtomicWrite", "atomic_write", "stream_to", "sweep_writes", "write_file"]

MARK = b"shardckpt is writing this file or folder, or died doing so: "
_READ = os.O_RDONLY | os.O_NONBLOCK
_STREAM_BYTES = 1 << 20

Foreign = Callable[[Sequence[str]], Sequence[str]]
"""Of the names in a folder, those that are not part of the checkpoint in it."""


@contextmanager
def atomic_write(
    path: str,
    *,
    overwrite: bool,
    index: str = "",
    foreign: Foreign = lambda names: (),
    system: System | None = None,
) -> Iterator[AtomicWrite]:
    """A file or folder that takes its name at the end of the with block, durably. Not collective.

    If the block raises, nothing of it remains. A symlink at `path` is followed. Folders above are
    made. An existing folder is replaced only by a folder, and only if it holds a file named
    `index` and nothing that `foreign` picks from its names.

    Args:
        path: The file or folder.
        overwrite: Replace what is there.
        index: A file that a folder of this kind holds; empty for a file.
        foreign: Picks the names in an existing folder that must not be removed.
        system: Makes the system calls.

    Yields:
        What creates the files.

    Raises:
        CheckpointExistsError: Something is there, and `overwrite` is false.
        NotACheckpointError: What is there is not of this kind.
        CheckpointBusyError: Another write to this path is under way.
        StorageError: The file system refused. The error says if the new one is visible already.
    """
    system = system or System()
    with translated(path):
        target = os.path.realpath(path)
        folder = os.path.dirname(target)
        make_directories(system, folder)
        lock = _take_lock(system, target)
    write = AtomicWrite(system, target, lock, overwrite=overwrite, index=index, foreign=foreign)
    try:
        with translated(path):
            if lock.held:
                _collect(system, folder, target)
            sweep_writes(system, folder)
            write.check_target()
            yield write
            write.publish()
    finally:
        write.end()


def write_file(path: str, data: bytes, *, overwrite: bool, system: System | None = None) -> None:
    """Write a file atomically. Raises as atomic_write. Not collective."""
    with atomic_write(path, overwrite=overwrite, system=system) as write:
        write.add_bytes(data)


class AtomicWrite:
    """One write; see atomic_write. `path` is where it is built."""

    def __init__(
        self,
        system: System,
        target: str,
        lock: Lock,
        *,
        overwrite: bool,
        index: str,
        foreign: Foreign,
    ) -> None:
        self.system, self.target = system, target
        self.path = beside_file(target, f"{uuid.uuid4().hex}.part")
        self._old = beside_file(target, "old")
        self._lock = lock
        self._overwrite, self._index, self._foreign = overwrite, index, foreign
        self._to_remove = [self.path]

    def check_target(self) -> None:
        """Raise if what stands at the target must not be replaced."""
        try:
            mode = self.system.stat(self.target).st_mode
        except FileNotFoundError:
            return
        names = self.system.listdir(self.target) if stat.S_ISDIR(mode) else []
        if self._index and stat.S_ISDIR(mode) and not names:
            return
        if not self._overwrite:
            raise CheckpointExistsError(
                "There is something at this path already",
                errno=errno.EEXIST,
                path=self.target,
                remedy="pass overwrite=True, or save to another path",
            )
        if not (self._index in names if self._index else stat.S_ISREG(mode)):
            raise NotACheckpointError(
                "overwrite=True replaces a checkpoint of the same kind, and nothing else",
                path=self.target,
                expected=f"a folder with {self._index}" if self._index else "a regular file",
                actual=_describe(mode),
                remedy="move it out of the way, or save to another path",
            )
        others = sorted(self._foreign(names))
        if others:
            raise NotACheckpointError(
                "overwrite=True would remove files that do not belong to the checkpoint",
                path=self.target,
                expected=f"files of a checkpoint, such as {self._index}",
                actual=", ".join(others[:8]),
                remedy="move them to another place, or save to another path",
            )

    def create(self, name: str = "", *, size_bytes: int = 0, direct: bool = True) -> LocalFile:
        """A new file: this one, or one in this folder. Its close makes it durable."""
        path = os.path.join(self.path, name) if name else self.path
        with translated(path):
            return LocalFile(self.system, path, size_bytes=size_bytes, direct=direct)

    def add_bytes(self, data: bytes, name: str = "") -> None:
        """Create a file with these bytes."""
        file = self.create(name, size_bytes=len(data), direct=False)
        try:
            file.write(memoryview(data), offset=0)
            file.close(size_bytes=len(data))
        except BaseException:
            file.discard()
            raise

    def make_folder(self) -> None:
        """Make this a folder."""
        self.system.mkdir(self.path)

    def publish(self) -> None:
        """Give it its name, durably."""
        if self._index:
            sync_directory(self.system, self.path)
        self.check_target()
        # Until it is known which of them are durable, neither the new nor the old one is removed.
        self._to_remove = []
        try:
            self._take_name()
        except OSError:
            self._to_remove = [self.path]
            raise
        try:
            with translated(self.target):
                sync_directory(self.system, os.path.dirname(self.target))
        except StorageError as error:
            error.message = (
                f"What was saved is visible under its name, but may not be durable. {error.message}"
            )
            error.remedy = f"{error.remedy}; then save again"
            raise
        self._to_remove = [self.path, self._old]

    def _take_name(self) -> None:
        """Rename to the target; what was there is at `path` or at `_old` after that."""
        if not exists(self.system, self.target):
            self.system.rename(self.path, self.target)
            return
        try:
            self.system.exchange(self.path, self.target)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        if not self._index:
            self.system.rename(self.path, self.target)
            return
        self.system.rename(self.target, self._old)
        try:
            self.system.rename(self.path, self.target)
        except OSError:
            self.system.rename(self._old, self.target)
            raise

    def end(self) -> None:
        """Remove what is left and release the lock; never raises OSError.

        What can't be removed keeps its lock file, so that the next write collects it.
        """
        clean = False
        try:
            with suppress(OSError):
                _remove(self.system, self._to_remove)
                clean = not any(exists(self.system, path) for path in (self.path, self._old))
        finally:
            _release(self._lock, remove=clean)


@contextmanager
def stream_to(
    file: LocalFile, progress: Callable[[int], None] = lambda written_bytes: None
) -> Iterator[BinaryIO]:
    """A file as a stream, for libraries that write to one; durable at the end of the with block.

    An error of the file system is raised as it was, whatever the library makes of it. `progress`
    is called with the bytes written so far.
    """
    sink = _Sink(file, progress)
    stream = io.BufferedWriter(cast(Any, sink), _STREAM_BYTES)
    try:
        yield cast(BinaryIO, stream)
        if not stream.closed:
            stream.flush()
        if sink.error is None:
            file.close(size_bytes=sink.end)
    except BaseException:
        if sink.error is None:
            raise
    finally:
        failed, sink.error = sink.error, sink.error or OSError(errno.EBADF, "This file is closed")
        file.discard()
    if failed is not None:
        raise failed


class _Sink(io.RawIOBase):
    """Appends to a file. After an error it takes everything: libraries write on while they end."""

    def __init__(self, file: LocalFile, progress: Callable[[int], None]) -> None:
        self.file, self.progress = file, progress
        self.end = 0
        self.error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.end

    def write(self, data: Any) -> int:
        with memoryview(data) as view:
            if self.error is None:
                try:
                    self.file.write(view.cast("B"), offset=self.end)
                except BaseException as error:
                    self.error = _without_frames(error)
                    del data  # nor may this frame keep it
                    raise self.error from self.error.__cause__
                self.end += view.nbytes
                self.progress(self.end)
            return view.nbytes


def _without_frames(error: BaseException) -> BaseException:
    """An error whose traceback does not keep the data: their memory is the library's."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return error


def sweep_writes(system: System, folder: str) -> None:
    """Remove what dead writes left in a folder; never raises OSError. Not collective.

    A write that is alive holds its lock. Where the file system has no locks, nothing is removed.
    """
    with suppress(OSError):
        for name in system.listdir(folder):
            if is_beside_file(name) and name.endswith(".lock"):
                with suppress(OSError):
                    _sweep_one(system, folder, os.path.join(folder, name))


def _sweep_one(system: System, folder: str, path: str) -> None:
    target = _marked_target(system, path)
    if target is None or beside_file(target, "lock") != path:
        return
    try:
        lock = Lock(system, path)
    except CheckpointBusyError:
        return
    clean = False
    try:
        clean = lock.held and _collect(system, folder, target)
    finally:
        _release(lock, remove=clean)


def _take_lock(system: System, target: str) -> Lock:
    """The lock of a target, whose file holds the mark, durably."""
    path = beside_file(target, "lock")
    mark = MARK + os.fsencode(os.path.basename(target)) + b"\n"
    if exists(system, path) and not mark.startswith(_content(system, path)):
        raise StorageError(
            "A file that shardckpt did not make stands where its lock file has to be",
            errno=errno.EEXIST,
            path=path,
            remedy="move it to another place",
        )
    lock = Lock(system, path)
    try:
        if system.fstat(lock.fd).st_size != len(mark):
            written = system.write(lock.fd, memoryview(mark), offset=0)
            if written != len(mark):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        system.fsync(lock.fd)
        sync_directory(system, os.path.dirname(path))
    except BaseException:
        _release(lock, remove=True)
        raise
    return lock


def _marked_target(system: System, path: str) -> str | None:
    """The target that a lock file names; None if it does not hold the mark."""
    content = _content(system, path)
    if not (content.startswith(MARK) and content.endswith(b"\n")):
        return None
    return os.path.join(os.path.dirname(path), os.fsdecode(content[len(MARK) : -1]))


def _content(system: System, path: str) -> bytes:
    """The first bytes of a lock file; of what is not a regular file, a text that is no mark."""
    fd = system.open(path, _READ)
    try:
        if not stat.S_ISREG(system.fstat(fd).st_mode):
            return b"(not a regular file)"
        data = bytearray(4096)
        return bytes(data[: system.read(fd, [memoryview(data)], offset=0)])
    finally:
        system.close(fd)


def _collect(system: System, folder: str, target: str) -> bool:
    """Remove what dead writes to a target left, under its lock; whether nothing remains."""
    begin, old = os.path.basename(beside_file(target, "")), beside_file(target, "old")
    lock = beside_file(target, "lock")
    found = [
        os.path.join(folder, name)
        for name in system.listdir(folder)
        if name.startswith(begin) and is_beside_file(name)
    ]
    left = [path for path in found if path != lock]
    if old in left and not exists(system, target):
        system.rename(old, target)  # a write died between its two renames
        left.remove(old)
        sync_directory(system, folder)
    if left:
        # What a dead write has published may not be durable yet. It must be before what it
        # replaced, perhaps one of these, goes.
        sync_directory(system, folder)
    return _remove(system, left)


def _remove(system: System, paths: list[str]) -> bool:
    """Remove files and folders, durably; whether that worked."""
    there = [path for path in paths if exists(system, path)]
    for path in there:
        remove_files(system, path)
    if there:
        sync_directory(system, os.path.dirname(there[0]))
    return not any(exists(system, path) for path in there)


def _release(lock: Lock, *, remove: bool) -> None:
    if remove:
        with suppress(OSError):
            lock.system.unlink(lock.path)
    with suppress(OSError):
        lock.system.unlock(lock.fd)
    with suppress(OSError):
        lock.system.close(lock.fd)


def _describe(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "another folder"
    return "a regular file" if stat.S_ISREG(mode) else "neither a regular file nor a folder"
