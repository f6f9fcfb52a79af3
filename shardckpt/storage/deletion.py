"""Removal of checkpoints, and of what dead saves and removals have left beside them.

All that is not wanted any more gets a hidden name `.NAME.tmp-ID` before anything in it goes, so
that no crash leaves a part of a checkpoint under its name.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from contextlib import suppress

from shardckpt.errors import CheckpointBusyError, StorageError
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.lock import Lock
from shardckpt.storage.posix import System, translated

__all__ = [
    "beside",
    "collect_leftovers",
    "directories_in",
    "exists",
    "old_name",
    "remove",
    "remove_tree",
    "sweep",
    "sync_directory",
]

_SHARD = ".safetensors"
_HIDDEN = re.compile(r"\.(.+)\.(?:tmp-[0-9a-f]{32}|(old|lock))")


def beside(target: str, kind: str) -> str:
    """The hidden name beside a checkpoint for something of a kind."""
    parent, name = os.path.split(target)
    return os.path.join(parent, f".{name}.{kind}")


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


def remove_tree(system: System, path: str) -> None:
    """Remove a directory and the files in it, as far as that works; never raises OSError.

    A manifest goes first, so that half of it is no checkpoint. Of a symlink the link goes, not what
    it leads to. A directory inside stays, and with it its parent: it is nobody's leftover.
    """
    with suppress(OSError):
        if not _is_directory(system, path):
            system.unlink(path)
            return
        for name in sorted(system.listdir(path), key=lambda name: name != MANIFEST_NAME):
            with suppress(IsADirectoryError):
                system.unlink(os.path.join(path, name))
        system.rmdir(path)


def directories_in(system: System, path: str, names: list[str]) -> list[str]:
    """Which names in a checkpoint's directory are directories: others made them, perhaps to keep
    checkpoints there."""
    strange = [name for name in names if name != MANIFEST_NAME and not name.endswith(_SHARD)]
    return [name for name in strange if _is_directory(system, os.path.join(path, name))]


def collect_leftovers(system: System, target: str) -> bool:
    """Remove what dead saves to this target left, under its lock: none is alive; whether there
    was anything."""
    parent = os.path.dirname(target)
    mark, old = os.path.basename(beside(target, "tmp-")), beside(target, "old")
    leftovers = [
        os.path.join(parent, name)
        for name in system.listdir(parent)
        if name.startswith(mark) or name == os.path.basename(old)
    ]
    if old in leftovers and not exists(system, target) and _is_directory(system, old):
        # A replacing save died between its two renames: the old checkpoint comes back.
        system.rename(old, target)
        leftovers.remove(old)
    if leftovers:
        # What a dead save has published may not be durable yet. It must be before the
        # checkpoint that it replaced, perhaps one of these, goes.
        sync_directory(system, parent)
    for leftover in leftovers:
        remove_tree(system, leftover)
    return bool(leftovers)


def remove(system: System, path: str) -> None:
    """Remove a checkpoint: its name first and for good, then its files as far as that works.

    Raises CheckpointBusyError while a save to this path is under way, StorageError where there is
    a directory in it.
    """
    with translated(path):
        target = os.path.realpath(path)
        parent = os.path.dirname(target)
        lock = Lock(system, beside(target, "lock"))
        try:
            if collect_leftovers(system, target):
                sync_directory(system, parent)  # or an old checkpoint could come back in part
            inside = directories_in(system, target, system.listdir(target))
            if inside:
                raise StorageError(
                    "A checkpoint is not removed while there is a directory in it",
                    errno=errno.ENOTEMPTY,
                    path=target,
                    actual=", ".join(inside[:5]),
                    remedy="move it to another place",
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
        found = [match for name in system.listdir(folder) if (match := _HIDDEN.fullmatch(name))]
        # Other programs call their files `.x.old` and `.x.lock` too.
        sure = {match[1] for match in found if not match[2]}
        for name in sorted({match[1] for match in found}):
            target = os.path.join(folder, name)
            if name in sure or _is_checkpoint(system, target):
                _sweep_one(system, target)


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
    match = _HIDDEN.fullmatch(name)
    return match[1] if match and match[2] == "old" else None


def _is_checkpoint(system: System, target: str) -> bool:
    return any(
        exists(system, os.path.join(path, MANIFEST_NAME))
        for path in (target, beside(target, "old"))
    )


def _is_directory(system: System, path: str) -> bool:
    return stat.S_ISDIR(system.stat(path).st_mode)


def exists(system: System, path: str) -> bool:
    """Whether there is anything at a path, be it a symlink to nothing."""
    try:
        system.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
