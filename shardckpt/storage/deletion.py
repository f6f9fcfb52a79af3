"""Remove checkpoints, and the leftovers of dead saves and removals beside them.

A checkpoint is renamed to a hidden name `.NAME.tmp-ID` before any of its files is removed, so that
a crash never leaves a part of a checkpoint under its name. A directory with such a name is removed
only if all files in it have names of shards or of the manifest. Other files are never removed.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import uuid
from contextlib import suppress

from shardckpt.config import current
from shardckpt.errors import CheckpointBusyError, StorageError
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.lock import Lock
from shardckpt.storage.names import hidden_path, is_checkpoint_file, is_shortened, parse
from shardckpt.storage.posix import System, translated

__all__ = [
    "collect_leftovers",
    "exists",
    "foreign_directories",
    "foreign_names",
    "make_directories",
    "old_name",
    "remove",
    "remove_files",
    "remove_tree",
    "sweep",
    "sync_directory",
]


def sync_directory(system: System, path: str) -> None:
    """Call fsync on a directory, which makes the names in it durable."""
    fd = system.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        system.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system does not support it
            raise
    finally:
        system.close(fd)


def make_directories(system: System, path: str) -> None:
    """Make a directory and its parents, durably."""
    missing: list[str] = []
    while True:  # no recursion: a path may have 2,000 folders
        above = os.path.dirname(path) or "."
        try:
            system.stat(path)
        except FileNotFoundError:
            missing.append(path)
            path = above
        else:
            # A process may have made it and died before it called fsync.
            with suppress(PermissionError):
                sync_directory(system, above)
            break
    for path in reversed(missing):
        with suppress(FileExistsError):
            system.mkdir(path)
        sync_directory(system, os.path.dirname(path) or ".")


def remove_files(system: System, path: str) -> None:
    """Remove a file, or a directory and the files in it. Never raises OSError.

    The caller has made these files. A symlink is removed, not followed. A directory inside the
    directory is kept, and so is its parent.
    """
    with suppress(OSError):
        if not _is_directory(system, path):
            system.unlink(path)
            return
        for name in system.listdir(path):
            with suppress(IsADirectoryError):
                system.unlink(os.path.join(path, name))
        system.rmdir(path)


def remove_tree(system: System, path: str, *, kept_in: str = "") -> None:
    """Remove a checkpoint's directory with its files, as far as possible. Never raises OSError.

    The manifest is removed first, so that a crash leaves no checkpoint with missing shards. Files
    that `foreign_names` returns are kept, and so is the directory that holds them.

    Args:
        system: Performs the system calls.
        path: The directory.
        kept_in: Another directory. A user's file that is also linked there is removed.
    """
    with suppress(OSError):
        names = system.listdir(path)
        foreign = foreign_names(system, path, names, kept_in=kept_in)
        for name in sorted(set(names).difference(foreign), key=lambda name: name != MANIFEST_NAME):
            with suppress(IsADirectoryError):
                system.unlink(os.path.join(path, name))
        system.rmdir(path)


def foreign_names(system: System, path: str, names: list[str], *, kept_in: str = "") -> list[str]:
    """Select the names in a checkpoint's directory that shardckpt has not made.

    Args:
        system: Performs the system calls.
        path: The directory.
        names: The names in it.
        kept_in: Another directory. Names under which it holds the same files are left out.
    """
    return [
        name
        for name in names
        if not is_checkpoint_file(name)
        and not (kept_in and _same(system, os.path.join(path, name), os.path.join(kept_in, name)))
    ]


def foreign_directories(system: System, path: str, names: list[str]) -> list[str]:
    """Select the directories in a checkpoint's directory, which may hold other checkpoints."""
    foreign = foreign_names(system, path, names)
    return [name for name in foreign if _is_directory(system, os.path.join(path, name))]


def collect_leftovers(system: System, target: str) -> bool:
    """Remove the leftovers of dead saves to a target. The caller holds its lock.

    Returns:
        Whether there were leftovers.
    """
    parent, old = os.path.split(hidden_path(target, "old"))
    parsed = parse(old)
    assert parsed is not None
    names = [n for n in system.listdir(parent) if n == old or parse(n) == (parsed.stem, "tmp")]
    old_path = os.path.join(parent, old)
    if (
        old in names
        and not exists(system, target)
        and exists(system, f"{old_path}/{MANIFEST_NAME}")
    ):
        # A save died between its two renames. Restore the old checkpoint.
        names.remove(old)
        # The stem of a long name is not the name. The next save to the name restores it.
        if not is_shortened(os.path.basename(target)):
            system.rename(old_path, target)
    paths = [os.path.join(parent, name) for name in names]
    leftovers = [path for path in paths if _is_leftover(system, path, target)]
    if leftovers:
        # One leftover may be the old checkpoint, if a save died after it exchanged the names. The
        # new checkpoint must be durable before the old one is removed.
        sync_directory(system, parent)
    for leftover in leftovers:
        remove_tree(system, leftover, kept_in=target)
    return bool(leftovers)


def _is_leftover(system: System, path: str, target: str) -> bool:
    """Whether a hidden directory was made by a save.

    It then holds only files of a checkpoint, and user's files that `target` holds too.
    """
    if not _is_directory(system, path):
        return False
    names = system.listdir(path)
    return not foreign_names(system, path, names, kept_in=target)


def remove(system: System, path: str) -> None:
    """Remove a checkpoint: first its name, durably, then its files, as far as possible.

    Raises:
        CheckpointBusyError: A save to this path is running.
        StorageError: The directory holds a file that shardckpt has not made, or the file system
            refused an operation.
    """
    with translated(path):
        target = os.path.realpath(path)
        parent = os.path.dirname(target)
        lock = Lock(system, hidden_path(target, "lock"))
        try:
            if collect_leftovers(system, target):
                sync_directory(system, parent)  # otherwise a part of an old checkpoint may reappear
            foreign = foreign_names(system, target, system.listdir(target))
            if foreign:
                raise StorageError(
                    "The checkpoint holds files that shardckpt has not made, and is not removed",
                    errno=errno.ENOTEMPTY,
                    path=target,
                    actual=", ".join(sorted(foreign)[:5]),
                    remedy="move them to another place",
                )
            hidden = hidden_path(target, f"tmp-{uuid.uuid4().hex}")
            system.rename(target, hidden)
            sync_directory(system, parent)
            remove_tree(system, hidden)
        finally:
            lock.release()


def sweep(system: System, folder: str) -> None:
    """Remove the leftovers of all dead saves and removals from a folder. Never raises OSError.

    A running save holds its lock. If the file system has no locks, nothing is removed.
    """
    with suppress(OSError):
        folder = os.path.realpath(folder)
        parsed = [hidden for name in system.listdir(folder) if (hidden := parse(name))]
        for stem in sorted({hidden.stem for hidden in parsed}):
            _sweep_one(system, os.path.join(folder, stem))


def _sweep_one(system: System, target: str) -> None:
    with suppress(CheckpointBusyError, OSError):
        lock = Lock(system, hidden_path(target, "lock"))
        try:
            if lock.held:
                collect_leftovers(system, target)
                _collect_parts(system, target)
        finally:
            lock.release()


def _collect_parts(system: System, target: str) -> None:
    """Remove checkpoints that nobody has gone on to assemble since `leftover_age_s`."""
    parent, old = os.path.split(hidden_path(target, "old"))
    parsed = parse(old)
    assert parsed is not None
    for name in system.listdir(parent):
        path = os.path.join(parent, name)
        if parse(name) == (parsed.stem, "parts") and _is_leftover(system, path, target):
            newest_s = max(
                system.stat(one).st_mtime
                for one in (path, *(os.path.join(path, file) for file in system.listdir(path)))
            )
            if newest_s < time.time() - current().leftover_age_s:
                remove_tree(system, path)


def old_name(name: str) -> str | None:
    """Return the checkpoint whose old version a hidden name holds. None for any other name."""
    hidden = parse(name)
    return hidden.stem if hidden and hidden.role == "old" else None


def _is_directory(system: System, path: str) -> bool:
    return stat.S_ISDIR(system.stat(path).st_mode)


def _same(system: System, one: str, other: str) -> bool:
    """Whether two paths are names of the same file."""
    with suppress(OSError):
        return os.path.samestat(system.stat(one), system.stat(other))
    return False


def exists(system: System, path: str) -> bool:
    """Whether a path exists. A broken symlink exists."""
    try:
        system.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
