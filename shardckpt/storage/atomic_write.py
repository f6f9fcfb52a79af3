"""Write single files and folders atomically: they appear under their name when they are durable.

While NAME is written, its folder also has these files. HASH is a digest of NAME, and ID is new for
each write. Both are 32 hexadecimal digits.

    .shardckpt-HASH.lock        holds MARK and NAME, and is locked while the write runs
    .shardckpt-HASH.ID.part     the new file or folder; after an exchange of names, the old one
    .shardckpt-HASH.old         the old folder, if the file system can't exchange names

The lock file is made durable before the others are created, and is removed after them. A file with
such a name but without a lock file that holds MARK therefore belongs to the user, and is never
changed. A file whose lock file is not locked was left by a process that died. Every write removes
such leftovers from its folder. docs/durability.md describes each step.
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
from shardckpt.storage.names import hidden_file_path, is_hidden_file
from shardckpt.storage.posix import UNSUPPORTED, System, translated

__all__ = ["AtomicWrite", "atomic_write", "stream_to", "sweep_writes", "write_file"]

MARK = b"shardckpt is writing this file or folder, or died doing so: "
_READ = os.O_RDONLY | os.O_NONBLOCK
_STREAM_BYTES = 1 << 20

ForeignNames = Callable[[Sequence[str]], Sequence[str]]
"""A function that returns those names in a folder that are not part of the checkpoint in it."""


@contextmanager
def atomic_write(
    path: str,
    *,
    overwrite: bool,
    index: Sequence[str] = (),
    foreign: ForeignNames = lambda names: (),
    system: System | None = None,
) -> Iterator[AtomicWrite]:
    """Write a file or folder that becomes visible and durable at the end of the with block.

    If the block raises, nothing remains of the write. A symlink at `path` is followed. Missing
    parent folders are made. An existing folder is replaced only by a folder, and only if it holds
    a file with a name of `index` and no name that `foreign` returns. Not collective.

    Args:
        path: The file or folder.
        overwrite: Replace an existing file or folder.
        index: Names of which each folder of this format has one. Empty to write a single file.
        foreign: Returns the names in an existing folder that must not be removed.
        system: Performs the system calls.

    Yields:
        The write, with methods that create the files.

    Raises:
        CheckpointExistsError: The path exists, and `overwrite` is false.
        NotACheckpointError: The path holds something else than this format.
        CheckpointBusyError: Another write to this path is running.
        StorageError: The file system refused an operation. The message says if the new file or
            folder is visible already.
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
    """Write a file atomically. Raises the errors of `atomic_write`. Not collective."""
    with atomic_write(path, overwrite=overwrite, system=system) as write:
        write.add_bytes(data)


class AtomicWrite:
    """A running write; see `atomic_write`. `path` is the temporary path."""

    def __init__(
        self,
        system: System,
        target: str,
        lock: Lock,
        *,
        overwrite: bool,
        index: Sequence[str],
        foreign: ForeignNames,
    ) -> None:
        self.system, self.target = system, target
        self.path = hidden_file_path(target, f"{uuid.uuid4().hex}.part")
        self._old = hidden_file_path(target, "old")
        self._lock = lock
        self._overwrite, self._index, self._foreign = overwrite, index, foreign
        self._to_remove = [self.path]

    def check_target(self) -> None:
        """Raise an error if the target must not be replaced."""
        try:
            mode = self.system.stat(self.target).st_mode
        except FileNotFoundError:
            return
        names = self.system.listdir(self.target) if stat.S_ISDIR(mode) else []
        if self._index and stat.S_ISDIR(mode) and not names:
            return
        if not self._overwrite:
            raise CheckpointExistsError(
                "The path exists already",
                errno=errno.EEXIST,
                path=self.target,
                remedy="pass overwrite=True, or save to another path",
            )
        index = " or ".join(self._index)
        if not (set(names).intersection(self._index) if index else stat.S_ISREG(mode)):
            raise NotACheckpointError(
                "overwrite=True replaces only a checkpoint of the same format",
                path=self.target,
                expected=f"a folder with {index}" if index else "a regular file",
                actual=_describe(mode),
                remedy="move it out of the way, or save to another path",
            )
        others = sorted(self._foreign(names))
        if others:
            raise NotACheckpointError(
                "overwrite=True would remove files that do not belong to the checkpoint",
                path=self.target,
                expected=f"files of a checkpoint, such as {self._index[0]}",
                actual=", ".join(others[:8]),
                remedy="move them to another place, or save to another path",
            )

    def create(self, name: str = "", *, size_bytes: int = 0, direct: bool = True) -> LocalFile:
        """Create the file, or a file in the folder. Closing it makes it durable."""
        path = os.path.join(self.path, name) if name else self.path
        with translated(path):
            return LocalFile(self.system, path, size_bytes=size_bytes, direct=direct)

    def add_bytes(self, data: bytes, name: str = "") -> None:
        """Create a file that holds `data`."""
        file = self.create(name, size_bytes=len(data), direct=False)
        try:
            file.write(memoryview(data), offset=0)
            file.close(size_bytes=len(data))
        except BaseException:
            file.discard()
            raise

    def make_folder(self) -> None:
        """Create the folder, under its temporary name."""
        self.system.mkdir(self.path)

    def publish(self) -> None:
        """Move the new file or folder to the target, durably."""
        if self._index:
            sync_directory(self.system, self.path)
        self.check_target()
        # Neither the new nor the old one is removed before the new one is known to be durable.
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
                f"The new checkpoint is visible, but may not be durable. {error.message}"
            )
            error.remedy = f"{error.remedy}; then save again"
            raise
        self._to_remove = [self.path, self._old]

    def _take_name(self) -> None:
        """Rename to the target. This moves an old file or folder to `path` or `_old`."""
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
        """Remove the remaining files and release the lock. Never raises OSError.

        If a file can't be removed, the lock file stays, so that the next write removes both.
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
    """Open a file as a stream, for libraries that write to streams.

    The file is durable at the end of the with block. An error of the file system is raised
    unchanged, also if the library replaces it by an error of its own.

    Args:
        file: The file.
        progress: Called with the number of bytes written so far.
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
    """Appends to a file. After an error it ignores writes, as libraries write while they close."""

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
                    del data  # this frame must not keep the data either
                    raise self.error from self.error.__cause__
                self.end += view.nbytes
                self.progress(self.end)
            return view.nbytes


def _without_frames(error: BaseException) -> BaseException:
    """Remove the tracebacks of an error, as they would keep the library's buffers alive."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return error


def sweep_writes(system: System, folder: str) -> None:
    """Remove the leftovers of dead writes from a folder. Never raises OSError. Not collective.

    A running write holds its lock. If the file system has no locks, nothing is removed.
    """
    with suppress(OSError):
        for name in system.listdir(folder):
            if is_hidden_file(name) and name.endswith(".lock"):
                with suppress(OSError):
                    _sweep_one(system, folder, os.path.join(folder, name))


def _sweep_one(system: System, folder: str, path: str) -> None:
    target = _marked_target(system, path)
    if target is None or hidden_file_path(target, "lock") != path:
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
    """Lock a target. The lock file durably holds the mark."""
    path = hidden_file_path(target, "lock")
    mark = MARK + os.fsencode(os.path.basename(target)) + b"\n"
    if exists(system, path) and not mark.startswith(_content(system, path)):
        raise StorageError(
            "The path of the lock file is taken by a file that shardckpt did not make",
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
    """Read the target from a lock file. None if the file does not hold the mark."""
    content = _content(system, path)
    if not (content.startswith(MARK) and content.endswith(b"\n")):
        return None
    return os.path.join(os.path.dirname(path), os.fsdecode(content[len(MARK) : -1]))


def _content(system: System, path: str) -> bytes:
    """Read the first bytes of a lock file. For other than regular files, return another text."""
    fd = system.open(path, _READ)
    try:
        if not stat.S_ISREG(system.fstat(fd).st_mode):
            return b"(not a regular file)"
        data = bytearray(4096)
        return bytes(data[: system.read(fd, [memoryview(data)], offset=0)])
    finally:
        system.close(fd)


def _collect(system: System, folder: str, target: str) -> bool:
    """Remove the leftovers of dead writes to a target. The caller holds its lock.

    Returns:
        Whether all were removed.
    """
    prefix, old = os.path.basename(hidden_file_path(target, "")), hidden_file_path(target, "old")
    lock = hidden_file_path(target, "lock")
    hidden = [
        os.path.join(folder, name)
        for name in system.listdir(folder)
        if name.startswith(prefix) and is_hidden_file(name)
    ]
    leftovers = [path for path in hidden if path != lock]
    if old in leftovers and not exists(system, target):
        system.rename(old, target)  # a write died between its two renames
        leftovers.remove(old)
        sync_directory(system, folder)
    if leftovers:
        # One leftover may be the old file, if a write died after it exchanged the names. The new
        # file must be durable before the old one is removed.
        sync_directory(system, folder)
    return _remove(system, leftovers)


def _remove(system: System, paths: list[str]) -> bool:
    """Remove files and folders durably. Returns whether all were removed."""
    existing = [path for path in paths if exists(system, path)]
    for path in existing:
        remove_files(system, path)
    if existing:
        sync_directory(system, os.path.dirname(existing[0]))
    return not any(exists(system, path) for path in existing)


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
