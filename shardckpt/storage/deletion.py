"""Removal of checkpoints, and of what dead saves and removals have left beside them.

A checkpoint gets a hidden name `.NAME.tmp-ID` before anything in it is removed, so that no crash
leaves a part of a checkpoint under its name. Under such a name a directory is removed only if each
file in it has a name that shardckpt gives: what others have made stays.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from contextlib import suppress

from shardckpt.errors import CheckpointBusyError, StorageError
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.lock import Lock
from shardckpt.storage.names import beside, is_cut, is_ours, parse
from shardckpt.storage.posix import System, translated

__all__ = [
    "collect_leftovers",
    "directories_in",
    "exists",
    "make_directories",
    "not_ours",
    "old_name",
    "remove",
    "remove_files",
    "remove_tree",
    "sweep",
    "sync_directory",
]


def sync_directory(system: System, path: str) -> None:
    """Make the names in a directory durable."""
    fd = system.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        system.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that have no such thing say EINVAL
            raise
    finally:
        system.close(fd)


def make_directories(system: System, path: str) -> None:
    """Make a directory and those above it, each of which is durable in the one above."""
    above = os.path.dirname(path)
    try:
        system.stat(path)
        # A process that died may have made it, and not got so far as to sync its name.
        with suppress(PermissionError):
            sync_directory(system, above)
    except FileNotFoundError:
        make_directories(system, above)
        with suppress(FileExistsError):
            system.mkdir(path)
        sync_directory(system, above)


def remove_files(system: System, path: str) -> None:
    """Remove a file, or a directory and the files in it; never raises OSError.

    Only for what this write has made. A symlink is removed, not followed. A directory inside stays,
    and with it its parent.
    """
    with suppress(OSError):
        if not _is_directory(system, path):
            system.unlink(path)
            return
        for name in system.listdir(path):
            with suppress(IsADirectoryError):
                system.unlink(os.path.join(path, name))
        system.rmdir(path)


def remove_tree(system: System, path: str, *, beside_target: str = "") -> None:
    """Remove a directory and the files in it that are ours, as far as that works; never raises
    OSError.

    The manifest is removed first, so that what a crash leaves is not a checkpoint. See `not_ours`
    for what stays, and with it the directory.
    """
    with suppress(OSError):
        names = system.listdir(path)
        stay = not_ours(system, path, names, target=beside_target)
        for name in sorted(set(names).difference(stay), key=lambda name: name != MANIFEST_NAME):
            with suppress(IsADirectoryError):
                system.unlink(os.path.join(path, name))
        system.rmdir(path)


def not_ours(system: System, path: str, names: list[str], *, target: str = "") -> list[str]:
    """Which names in a checkpoint's directory shardckpt has not made, without those of files that
    `target`, another directory, has under the same name."""
    return [
        name
        for name in names
        if not is_ours(name)
        and not (target and _same(system, os.path.join(path, name), os.path.join(target, name)))
    ]


def directories_in(system: System, path: str, names: list[str]) -> list[str]:
    """Which names in a checkpoint's directory are directories: others made them, perhaps to keep
    checkpoints there."""
    strange = not_ours(system, path, names)
    return [name for name in strange if _is_directory(system, os.path.join(path, name))]


def collect_leftovers(system: System, target: str) -> bool:
    """Remove what dead saves to this target left, under its lock, so that none is alive; whether
    there was anything."""
    parent, old = os.path.split(beside(target, "old"))
    hidden = parse(old)
    assert hidden is not None
    found = [n for n in system.listdir(parent) if n == old or parse(n) == (hidden[0], "tmp")]
    aside = os.path.join(parent, old)
    if old in found and not exists(system, target) and exists(system, f"{aside}/{MANIFEST_NAME}"):
        # A replacing save died between its two renames: the old checkpoint comes back.
        found.remove(old)
        if not is_cut(os.path.basename(target)):  # else the next save to the real name does it
            system.rename(aside, target)
    paths = [os.path.join(parent, name) for name in found]
    leftovers = [path for path in paths if _is_leftover(system, path, target)]
    if leftovers:
        # What a dead save has published may not be durable yet. It must be before the
        # checkpoint that it replaced, perhaps one of these, goes.
        sync_directory(system, parent)
    for leftover in leftovers:
        remove_tree(system, leftover, beside_target=target)
    return bool(leftovers)


def _is_leftover(system: System, path: str, target: str) -> bool:
    """Whether a save made what stands under a hidden name: a directory that holds files of ours
    alone, or of the user's that the checkpoint at `target` still has."""
    if not _is_directory(system, path):
        return False
    names = system.listdir(path)
    return not not_ours(system, path, names, target=target)


def remove(system: System, path: str) -> None:
    """Remove a checkpoint: its name first and for good, then its files as far as that works.

    Raises CheckpointBusyError while a save to this path is under way, StorageError where there is
    anything in it that shardckpt has not made.
    """
    with translated(path):
        target = os.path.realpath(path)
        parent = os.path.dirname(target)
        lock = Lock(system, beside(target, "lock"))
        try:
            if collect_leftovers(system, target):
                sync_directory(system, parent)  # or an old checkpoint could come back in part
            inside = not_ours(system, target, system.listdir(target))
            if inside:
                raise StorageError(
                    "A checkpoint is not removed while it holds files that shardckpt has not made",
                    errno=errno.ENOTEMPTY,
                    path=target,
                    actual=", ".join(sorted(inside)[:5]),
                    remedy="move them to another place",
                )
            hidden = beside(target, f"tmp-{uuid.uuid4().hex}")
            system.rename(target, hidden)
            sync_directory(system, parent)
            remove_tree(system, hidden)
        finally:
            lock.release()


def sweep(system: System, folder: str) -> None:
    """Remove what dead saves and removals left in a folder, of all checkpoints; never raises
    OSError. What is alive holds its lock; where there are no locks, nothing is removed."""
    with suppress(OSError):
        folder = os.path.realpath(folder)
        found = [hidden for name in system.listdir(folder) if (hidden := parse(name))]
        for stem in sorted({stem for stem, _ in found}):
            _sweep_one(system, os.path.join(folder, stem))


def _sweep_one(system: System, target: str) -> None:
    with suppress(CheckpointBusyError, OSError):
        lock = Lock(system, beside(target, "lock"))
        try:
            if lock.held:
                collect_leftovers(system, target)
        finally:
            lock.release()


def old_name(name: str) -> str | None:
    """The checkpoint that a hidden name holds, set aside by a save that did not get on."""
    hidden = parse(name)
    return hidden[0] if hidden and hidden[1] == "old" else None


def _is_directory(system: System, path: str) -> bool:
    return stat.S_ISDIR(system.stat(path).st_mode)


def _same(system: System, one: str, other: str) -> bool:
    """Whether two paths are names of the same file."""
    with suppress(OSError):
        found = [system.stat(path) for path in (one, other)]
        return found[0].st_ino == found[1].st_ino and found[0].st_dev == found[1].st_dev
    return False


def exists(system: System, path: str) -> bool:
    """Whether there is anything at a path, be it a symlink to nothing."""
    try:
        system.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
