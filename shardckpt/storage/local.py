"""Checkpoints as directories of a file system that all ranks share.

A save writes into `.NAME.tmp-ID` beside its target, and renames that directory to NAME when all
files and the directory are durable. It holds a lock until then. storage/names lists all hidden
names, and docs/durability.md describes each step. A save first removes the leftovers of dead saves
(storage/deletion). A user's files in a checkpoint are linked into the checkpoint that replaces it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Hashable
from contextlib import suppress

from shardckpt.config import current
from shardckpt.errors import (
    CheckpointBusyError,
    CheckpointExistsError,
    DirectoryNotSharedError,
    NotACheckpointError,
    StateError,
    StorageError,
)
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.format.manifest import MANIFEST_HEAD, is_shard_name
from shardckpt.storage import deletion
from shardckpt.storage.base import (
    MANIFEST_NAME,
    CheckpointFiles,
    Storage,
    WritableFile,
    WriteTransaction,
)
from shardckpt.storage.deletion import (
    collect_leftovers,
    exists,
    foreign_directories,
    foreign_names,
    make_directories,
    old_name,
    remove_tree,
    sync_directory,
)
from shardckpt.storage.local_reader import LocalFiles
from shardckpt.storage.lock import Lock
from shardckpt.storage.names import hidden_path
from shardckpt.storage.paths import is_alias, local_path
from shardckpt.storage.posix import UNSUPPORTED, System, translated

__all__ = ["LocalStorage"]

_WRITE = os.O_CREAT | os.O_WRONLY
_UNFINISHED = re.compile(r"unfinished[0-9a-f]{32}\.safetensors$")


class LocalStorage(Storage):
    """Checkpoints in directories of a file system that all ranks share.

    Args:
        system: Performs the system calls.

    Example:
        >>> import torch, shardckpt
        >>> storage = shardckpt.LocalStorage()
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1", storage=storage)
    """

    def __init__(self, system: System | None = None) -> None:
        self.system = system or System()

    def full_path(self, path: str) -> str:
        """See Storage.full_path. `~` is expanded, and `file:///folder` becomes `/folder`."""
        return local_path(path)

    def names(self, folder: str) -> list[str]:
        """See Storage.names. Includes a checkpoint that a failed overwrite moved."""
        with translated(folder):
            try:
                names = self.system.listdir(folder)
            except (FileNotFoundError, NotADirectoryError):
                return []
        moved = {name for name in map(old_name, names) if name}
        visible = (
            name for name in names if not name.startswith(".") and not is_alias(folder, name)
        )
        return sorted({*visible, *moved})

    def exists(self, path: str) -> bool:
        """See Storage.exists. Anything counts, also a symbolic link to nothing."""
        return exists(self.system, path)

    def version(self, path: str) -> Hashable:
        """See Storage.version: inode, time of change and size of the manifest. Cheap."""
        with translated(path):
            try:
                found = self.system.stat(os.path.join(path, MANIFEST_NAME))
            except FileNotFoundError:
                found = self.system.stat(os.path.join(hidden_path(path, "old"), MANIFEST_NAME))
        return found.st_ino, found.st_mtime_ns, found.st_size

    def remove(self, path: str) -> None:
        """See Storage.remove. A checkpoint that holds files of other programs stays."""
        deletion.remove(self.system, path)

    def sweep(self, folder: str) -> None:
        """See Storage.sweep. A save that is alive holds its lock."""
        deletion.sweep(self.system, folder)

    def begin(self, path: str, *, checkpoint_id: str, overwrite: bool) -> LocalTransaction:
        """See Storage.begin. Missing parent directories are made."""
        path = local_path(path)
        with translated(path):
            target = os.path.realpath(path)
            _check_replaceable(target)
            _check_outside(self.system, os.path.dirname(target))
            make_directories(self.system, os.path.dirname(target))
            lock = Lock(self.system, hidden_path(target, "lock"))
            try:
                collect_leftovers(self.system, target)
                _check_target(self.system, target, overwrite=overwrite)
                temporary = hidden_path(target, f"tmp-{checkpoint_id}")
                self.system.mkdir(temporary)
            except BaseException:
                lock.release()
                raise
        return LocalTransaction(
            self.system, path, target, checkpoint_id, lock=lock, overwrite=overwrite
        )

    def join(self, path: str, *, token: str) -> LocalTransaction:
        """See Storage.join."""
        path = local_path(path)
        with translated(path):
            target = os.path.realpath(path)
        temporary = hidden_path(target, f"tmp-{token}")
        give_up_at = time.monotonic() + current().shared_deadline_s
        while True:
            try:
                self.system.stat(temporary)
                return LocalTransaction(self.system, path, target, token)
            except FileNotFoundError:
                pass  # A network file system may show the directory later.
            except OSError:
                with translated(temporary):
                    raise
            if time.monotonic() > give_up_at:
                raise DirectoryNotSharedError(
                    "This rank does not see the directory that rank 0 created",
                    path=path,
                    expected=temporary,
                    actual="nothing there",
                    remedy="save to a file system that all ranks share, under the same path",
                )
            with suppress(OSError):
                self.system.listdir(os.path.dirname(target))  # updates the cache of NFS
            time.sleep(0.05)

    def assemble(self, path: str, *, checkpoint_id: str, overwrite: bool) -> LocalTransaction:
        """See Storage.assemble. The lock is held only during the commit."""
        path = local_path(path)
        with translated(path):
            target = os.path.realpath(path)
            _check_replaceable(target)
            _check_outside(self.system, os.path.dirname(target))
            make_directories(self.system, os.path.dirname(target))
            _check_target(self.system, target, overwrite=overwrite)
            parts = hidden_path(target, f"parts-{checkpoint_id}")
            with suppress(FileExistsError):
                self.system.mkdir(parts)
            # A process that commits has renamed the directory, and this is a new one.
            if exists(self.system, hidden_path(target, f"tmp-{checkpoint_id}")):
                with suppress(OSError):
                    self.system.rmdir(parts)
                raise CheckpointBusyError(
                    "Another process commits the checkpoint",
                    errno=errno.EAGAIN,
                    path=path,
                    remedy="wait for it",
                )
        return _Assembly(self.system, path, target, checkpoint_id, overwrite=overwrite)

    def open(self, path: str) -> LocalFiles:
        """See Storage.open."""
        path = local_path(path)
        with translated(path):
            return LocalFiles(self.system, path)


def _check_replaceable(target: str) -> None:
    """Raise an error for the root and the working directory, which a rename can't replace."""
    working = ""
    with suppress(FileNotFoundError):  # the working directory was removed
        working = os.path.realpath(os.getcwd())
    if target in ("/", working):
        raise StateError(
            "A checkpoint can't replace the root or the working directory",
            path=target,
            expected="a path below it, or another directory",
            remedy='save to a directory in it, as in "./checkpoint"',
        )


def _check_outside(system: System, folder: str) -> None:
    """Raise an error if the folder of a new checkpoint is itself a checkpoint."""
    found = exists(system, os.path.join(folder, MANIFEST_NAME))
    if found and _is_checkpoint(system, folder, system.listdir(folder)):
        raise StateError(
            "A checkpoint can't be saved inside another checkpoint",
            path=folder,
            expected="a folder that holds checkpoints",
            actual=f"a checkpoint, with its {MANIFEST_NAME}",
            remedy="save to a path beside it",
        )


def _check_target(system: System, target: str, *, overwrite: bool) -> None:
    """Raise an error if a checkpoint must not be saved to a path."""
    try:
        status = system.stat(target)
    except FileNotFoundError:
        return
    directory = stat.S_ISDIR(status.st_mode)
    names = system.listdir(target) if directory else []
    if directory and not names:
        return
    if not overwrite:
        raise CheckpointExistsError(
            "The path exists already",
            errno=errno.EEXIST,
            path=target,
            expected="a free path, or an empty directory",
            actual="a checkpoint" if MANIFEST_NAME in names else _describe(status),
            remedy="save to another path, or pass overwrite=True to replace a checkpoint",
        )
    if not _is_checkpoint(system, target, names):
        raise NotACheckpointError(
            "overwrite=True replaces only a checkpoint",
            path=target,
            expected=f"a directory with a {MANIFEST_NAME} of shardckpt",
            actual=_describe(status),
            remedy="move it out of the way, or save to another path",
        )
    directories = foreign_directories(system, target, names)
    if directories:
        raise NotACheckpointError(
            "overwrite=True replaces only a checkpoint, but the path also holds directories",
            path=target,
            expected="files of a checkpoint",
            actual=f"directories: {', '.join(directories[:5])}",
            remedy="move them to another place, or save to another path",
        )


def _is_checkpoint(system: System, target: str, names: list[str]) -> bool:
    """Whether a directory is a checkpoint. If it has a shard, its manifest may be corrupted."""
    if MANIFEST_NAME not in names or any(map(is_shard_name, names)):
        return MANIFEST_NAME in names
    head = memoryview(bytearray(len(MANIFEST_HEAD)))
    fd = system.open(os.path.join(target, MANIFEST_NAME), os.O_RDONLY | os.O_NONBLOCK)
    try:
        system.read(fd, [head], offset=0)
    finally:
        system.close(fd)
    return bytes(head) == MANIFEST_HEAD


def _describe(status: os.stat_result) -> str:
    return "a directory" if stat.S_ISDIR(status.st_mode) else "a file"


class LocalTransaction(WriteTransaction):
    """A checkpoint that is being written to a temporary directory; see WriteTransaction."""

    def __init__(
        self,
        system: System,
        path: str,
        target: str,
        token: str,
        *,
        lock: Lock | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.token = token
        self._system = system
        self._target = target
        self._temporary = hidden_path(target, f"tmp-{token}")
        self._lock = lock
        self._overwrite = overwrite
        self._published = False

    def create(self, name: str, *, size_bytes: int, shared: bool = False) -> LocalFile:
        """See WriteTransaction.create."""
        path = os.path.join(self._temporary, name)
        with translated(path):
            return LocalFile(self._system, path, size_bytes=size_bytes, shared=shared)

    def link(self, name: str, source: CheckpointFiles) -> bool:
        """See WriteTransaction.link. The link becomes durable in `commit`."""
        path = os.path.join(self._temporary, name)
        return isinstance(source, LocalFiles) and source.link_or_clone(name, path)

    def create_from(
        self, name: str, source: CheckpointFiles, *, size_bytes: int
    ) -> LocalFile | None:
        """See WriteTransaction.create_from. A clone of the first block shows whether the file
        system can share ranges."""
        if not isinstance(source, LocalFiles) or size_bytes <= BLOCK_BYTES:
            return None
        path = os.path.join(self._temporary, name)
        with translated(path):
            file = _CloningFile(self._system, path, name, source, size_bytes=size_bytes)
            if file.clone(offset=0, size_bytes=BLOCK_BYTES):
                return file
            file.discard()
            self._system.unlink(path)
        return None

    def commit(self, manifest: bytes) -> None:
        """See WriteTransaction.commit."""
        assert self._lock is not None, "only rank 0 commits"
        with translated(self._target):
            path = os.path.join(self._temporary, MANIFEST_NAME)
            file = LocalFile(self._system, path, size_bytes=len(manifest), direct=False)
            try:
                file.write(memoryview(manifest), offset=0)
                file.close(size_bytes=len(manifest))
            except BaseException:
                file.discard()
                raise
            # The path may have changed since `begin`.
            _check_target(self._system, self._target, overwrite=self._overwrite)
            self._carry_over()
            sync_directory(self._system, self._temporary)
            # From here on, the temporary directory may be the old checkpoint. It must not be
            # removed before the new checkpoint is known to be durable.
            self._published = True
            replaced = self._publish()
            sync_directory(self._system, os.path.dirname(self._target))
        if replaced is not None:
            remove_tree(self._system, replaced, kept_in=self._target)

    def _carry_over(self) -> None:
        """Link the user's files in the old checkpoint into the new one."""
        if not exists(self._system, self._target):
            return
        directory = self._system.open(self._target, os.O_RDONLY | os.O_DIRECTORY)
        try:
            names = self._system.listdir(directory)
            for name in foreign_names(self._system, self._target, names):
                path = os.path.join(self._temporary, name)
                self._system.link(name, path, dir_fd=directory)
        except OSError as error:
            raise StorageError(
                "The checkpoint holds a file that shardckpt has not made and can't keep",
                errno=error.errno,
                path=self._target,
                expected="a file system with hard links",
                actual=str(error),
                remedy="move it to another place and save again, or save to another path",
            ) from error
        finally:
            self._system.close(directory)

    def _publish(self) -> str | None:
        """Rename the new checkpoint to its path. Returns the new path of an old checkpoint."""
        try:
            self._system.rename(self._temporary, self._target)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            self._system.exchange(self._temporary, self._target)
            return self._temporary
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        # The name for an old checkpoint is fixed, so that there is never more than one.
        old = hidden_path(self._target, "old")
        self._system.rename(self._target, old)
        self._system.rename(self._temporary, self._target)
        return old

    def abandon(self) -> None:
        """See WriteTransaction.abandon."""
        if self._lock is not None and not self._published:
            remove_tree(self._system, self._temporary, kept_in=self._target)
        self.close()

    def close(self) -> None:
        """See WriteTransaction.close."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


class LocalFile(WritableFile):
    """A file that is being written, with O_DIRECT if possible; see WritableFile.

    Args:
        system: Performs the system calls.
        path: The path of the file.
        size_bytes: The final size of the file.
        direct: Try O_DIRECT.
        shared: The file may exist already.
    """

    def __init__(
        self,
        system: System,
        path: str,
        *,
        size_bytes: int,
        direct: bool = True,
        shared: bool = False,
    ) -> None:
        self._system = system
        self._path = path
        self.direct = direct and hasattr(os, "O_DIRECT")
        self._fd = system.open(path, _WRITE if shared else _WRITE | os.O_EXCL)
        self._open = True
        try:
            if self.direct:
                self.direct = self._can(lambda: system.direct(self._fd, on=True))
            self._allocate(size_bytes)
        except BaseException:
            self.discard()
            raise

    def _allocate(self, size_bytes: int) -> None:
        self._can(lambda: self._system.allocate(self._fd, size_bytes=size_bytes))

    def _can(self, call: Callable[[], None]) -> bool:
        """Make a call. Returns whether the file system supports it."""
        try:
            call()
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return False
        return True

    def write(self, data: memoryview, *, offset: int) -> None:
        """See WritableFile.write."""
        with translated(self._path):
            while data:
                try:
                    written = self._system.write(self._fd, data, offset=offset)
                except OSError as error:
                    if not self.direct or error.errno != errno.EINVAL:
                        raise
                    self._buffered()
                    continue
                if written <= 0:
                    raise OSError(errno.EIO, "no bytes were written", self._path)
                data, offset = data[written:], offset + written
                if data and written % 4096:
                    self._buffered()

    def _buffered(self) -> None:
        self._system.direct(self._fd, on=False)
        self.direct = False

    def close(self, *, size_bytes: int) -> None:
        """See WritableFile.close. A failed fsync is not repeated, as Linux reports errors once."""
        with translated(self._path):
            self._system.truncate(self._fd, size_bytes=size_bytes)
            self._system.fsync(self._fd)
            self._open = False
            self._system.close(self._fd)

    def discard(self) -> None:
        """See WritableFile.discard."""
        if self._open:
            self._open = False
            with suppress(OSError):
                self._system.close(self._fd)


class _CloningFile(LocalFile):
    """A file that takes over ranges of a shard of an earlier checkpoint.

    Its space is not allocated in advance, as Btrfs would keep the space of the ranges too.
    """

    def __init__(
        self, system: System, path: str, name: str, source: LocalFiles, *, size_bytes: int
    ) -> None:
        self._name, self._source = name, source
        super().__init__(system, path, size_bytes=size_bytes)

    def _allocate(self, size_bytes: int) -> None:
        self._system.truncate(self._fd, size_bytes=size_bytes)

    def clone(self, *, offset: int, size_bytes: int) -> bool:
        """See WritableFile.clone."""
        return self._source.clone_range(self._name, self._fd, offset=offset, size_bytes=size_bytes)


class _Assembly(LocalTransaction):
    """A checkpoint that several processes write to `.NAME.parts-ID`, without a lock.

    A file has its name once it is complete and durable.
    """

    resumes = True

    def __init__(
        self, system: System, path: str, target: str, token: str, *, overwrite: bool
    ) -> None:
        super().__init__(system, path, target, token, overwrite=overwrite)
        self._parts = hidden_path(target, f"parts-{token}")

    def create(self, name: str, *, size_bytes: int, shared: bool = False) -> LocalFile:
        """See WriteTransaction.create."""
        path = os.path.join(self._parts, name)
        with translated(path):
            return _AssembledFile(self._system, path, size_bytes=size_bytes)

    def has(self, name: str, *, size_bytes: int) -> bool:
        """See WriteTransaction.has."""
        path = os.path.join(self._parts, name)
        with translated(path):
            try:
                return self._system.stat(path).st_size == size_bytes
            except FileNotFoundError:
                return False

    def link(self, name: str, source: CheckpointFiles) -> bool:
        """See WriteTransaction.link."""
        path = os.path.join(self._parts, name)
        return isinstance(source, LocalFiles) and source.link_or_clone(name, path)

    def create_from(self, name: str, source: CheckpointFiles, *, size_bytes: int) -> None:
        """See WriteTransaction.create_from. A file without its final name takes nothing over."""

    def commit(self, manifest: bytes) -> None:
        """See WriteTransaction.commit. Raises CheckpointBusyError if another process commits."""
        with translated(self._target):
            self._lock = Lock(self._system, hidden_path(self._target, "lock"))
            collect_leftovers(self._system, self._target)
            for name in self._system.listdir(self._parts):
                if name == MANIFEST_NAME or _UNFINISHED.search(name):  # of a copy that failed
                    self._system.unlink(os.path.join(self._parts, name))
            self._system.rename(self._parts, self._temporary)
        try:
            super().commit(manifest)
        except BaseException:
            if not self._published:
                with suppress(OSError):
                    self._system.rename(self._temporary, self._parts)
            raise

    def abandon(self) -> None:
        """See WriteTransaction.abandon. The files stay, as other processes go on with them."""
        self.close()

    def close(self) -> None:
        """See WriteTransaction.close."""
        with suppress(OSError):
            self._system.rmdir(self._parts)  # if it is empty
        super().close()


class _AssembledFile(LocalFile):
    """A file that gets its name when it is closed."""

    def __init__(self, system: System, path: str, *, size_bytes: int) -> None:
        self._final = path
        # The name of a shard, as no other file of shardckpt may be in a checkpoint's directory.
        stem = path.removesuffix(".safetensors")
        joint = "" if re.search(r"-of-\d+-[a-z0-9]+$", stem) else "-"
        unfinished = f"{stem}{joint}unfinished{uuid.uuid4().hex}.safetensors"
        super().__init__(system, unfinished, size_bytes=size_bytes)

    def close(self, *, size_bytes: int) -> None:
        """See WritableFile.close."""
        super().close(size_bytes=size_bytes)
        with translated(self._final):
            self._system.rename(self._path, self._final)

    def discard(self) -> None:
        """See WritableFile.discard."""
        was_open = self._open
        super().discard()
        if was_open:
            with suppress(OSError):
                self._system.unlink(self._path)
