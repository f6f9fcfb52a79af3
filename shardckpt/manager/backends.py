"""What a CheckpointManager does with one checkpoint: a directory of shards, by default."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from shardckpt import api
from shardckpt.loading.shard_reader import check_size
from shardckpt.reports import LoadReport
from shardckpt.saving.async_save import SaveHandle
from shardckpt.storage import deletion as removal
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.names import beside
from shardckpt.storage.posix import System, translated

__all__ = ["RECORD", "Format", "Sharded", "Signature", "signature_of"]

RECORD = "checkpoint_manager"
"""The key under which a managed checkpoint says its label, step, metrics and time."""


Signature = tuple[int, int, int]


def signature_of(found: os.stat_result) -> Signature:
    """Of a file that is another one, or has another time, when the checkpoint is another."""
    return found.st_ino, found.st_mtime_ns, found.st_size


class Format(Protocol):
    """How a manager's checkpoints are stored. Broken ones raise CheckpointError or StorageError."""

    def names(self, folder: str) -> list[str]:
        """The names in a folder that may be checkpoints, sorted; none without the folder."""

    def sweep(self, folder: str) -> None:
        """Remove what dead saves and removals left in a folder, as far as that works."""

    def exists(self, path: str) -> bool:
        """Whether there is anything at a path."""

    def save(
        self,
        state: Any,
        path: str,
        *,
        overwrite: bool,
        asynchronous: bool,
        process_group: Any,
        base: str | None,
    ) -> SaveHandle | None:
        """Save a state; collective. The handle of a save that goes on in the background. `base` is
        an earlier checkpoint, from which it may take what has not changed."""

    def load(self, state: Any, path: str, *, strict: bool, process_group: Any) -> LoadReport:
        """Load into a state; collective."""

    def signature(self, path: str) -> Signature:
        """Something cheap that changes when the checkpoint does."""

    def record(self, path: str) -> Any:
        """What was saved under RECORD, of a checkpoint that looks whole; None without one."""

    def verify(self, path: str, *, quick: bool, progress: Callable[[int], None]) -> None:
        """Raise if the checkpoint is broken."""

    def remove(self, path: str) -> None:
        """Remove the checkpoint; raises StorageError."""


class Sharded:
    """Directories of shards; see Format. `system` makes the system calls."""

    def __init__(self, system: System | None = None) -> None:
        self._system = system or System()
        self._storage = LocalStorage(self._system)

    def names(self, folder: str) -> list[str]:
        """See Format.names. A checkpoint that a replacing save left aside counts."""
        with translated(folder):
            try:
                found = self._system.listdir(folder)
            except (FileNotFoundError, NotADirectoryError):
                return []
        aside = {name for name in map(removal.old_name, found) if name}
        return sorted({name for name in found if not name.startswith(".")} | aside)

    def sweep(self, folder: str) -> None:
        """See Format.sweep."""
        removal.sweep(self._system, folder)

    def exists(self, path: str) -> bool:
        """See Format.exists."""
        return removal.exists(self._system, path)

    def save(
        self,
        state: Any,
        path: str,
        *,
        overwrite: bool,
        asynchronous: bool,
        process_group: Any,
        base: str | None,
    ) -> SaveHandle | None:
        """See Format.save."""
        options: Any = {
            "overwrite": overwrite,
            "process_group": process_group,
            "base": base,
            "storage": self._storage,
        }
        if asynchronous:
            return api.async_save(state, path, **options)
        api.save(state, path, **options)
        return None

    def load(self, state: Any, path: str, *, strict: bool, process_group: Any) -> LoadReport:
        """See Format.load."""
        options: Any = {"process_group": process_group, "storage": self._storage}
        return api.load(state, path, strict=strict, **options)

    def signature(self, path: str) -> Signature:
        """See Format.signature."""
        try:
            found = self._system.stat(os.path.join(path, MANIFEST_NAME))
        except FileNotFoundError:
            found = self._system.stat(os.path.join(beside(path, "old"), MANIFEST_NAME))
        return signature_of(found)

    def record(self, path: str) -> Any:
        """See Format.record."""
        with api.open_checkpoint(path, storage=self._storage) as checkpoint:
            for shard in checkpoint.manifest.shards:
                check_size(checkpoint.files, shard)
            if f"{RECORD}.step" not in checkpoint:
                return None
            return checkpoint.load_state(keys=RECORD)[RECORD]

    def verify(self, path: str, *, quick: bool, progress: Callable[[int], None]) -> None:
        """See Format.verify."""
        with api.open_checkpoint(path, storage=self._storage) as checkpoint:
            if quick:
                for shard in checkpoint.manifest.shards:
                    check_size(checkpoint.files, shard)
            else:
                checkpoint.verify(progress=progress)

    def remove(self, path: str) -> None:
        """See Format.remove."""
        removal.remove(self._system, path)
