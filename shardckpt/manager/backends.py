"""Backends of CheckpointManager, which store its checkpoints. The default writes shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from shardckpt import api
from shardckpt.loading.shard_reader import check_size
from shardckpt.reports import LoadReport
from shardckpt.saving.async_save import SaveHandle
from shardckpt.storage import deletion
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.names import hidden_path
from shardckpt.storage.posix import System, translated

__all__ = ["RECORD", "CheckpointBackend", "ShardedBackend", "Signature", "signature_of"]

RECORD = "checkpoint_manager"
"""The key of the entry with a checkpoint's label, owner, step, metrics and time."""


Signature = tuple[int, int, int]
"""The inode, the time of change in nanoseconds, and the size in bytes of a file."""


def signature_of(status: os.stat_result) -> Signature:
    """Return the signature of a file, which changes when the file is replaced."""
    return status.st_ino, status.st_mtime_ns, status.st_size


class CheckpointBackend(Protocol):
    """The interface of a backend, which stores the checkpoints of a manager.

    Methods raise CheckpointError for corrupted checkpoints, and StorageError.
    """

    def names(self, folder: str) -> list[str]:
        """List the names in a folder that may be checkpoints, sorted.

        Returns an empty list if the folder does not exist.
        """

    def sweep(self, folder: str) -> None:
        """Remove the leftovers of failed saves and removals from a folder, as far as possible."""

    def exists(self, path: str) -> bool:
        """Whether a path exists."""

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
        """Save a state. Collective. Returns the handle if the save continues in the background.

        `base` is an earlier checkpoint, whose unchanged files may be linked.
        """

    def load(self, state: Any, path: str, *, strict: bool, process_group: Any) -> LoadReport:
        """Load a checkpoint into a state. Collective."""

    def signature(self, path: str) -> Signature:
        """Return a value that changes when the checkpoint is replaced. The call is cheap."""

    def record(self, path: str) -> Any:
        """Return the entry RECORD of a complete checkpoint. None if it has no such entry."""

    def verify(self, path: str, *, quick: bool, progress: Callable[[int], None]) -> None:
        """Verify the checkpoint.

        Args:
            path: The checkpoint.
            quick: Read only the manifest and the sizes of files.
            progress: Called with the number of bytes verified so far.

        Raises:
            CorruptionError: The checkpoint is corrupted.
        """

    def remove(self, path: str) -> None:
        """Remove the checkpoint.

        Raises:
            StorageError: The checkpoint can't be removed.
        """


class ShardedBackend:
    """Stores checkpoints as directories of shards; see CheckpointBackend.

    Args:
        system: Performs the system calls.
    """

    def __init__(self, system: System | None = None) -> None:
        self._system = system or System()
        self._storage = LocalStorage(self._system)

    def names(self, folder: str) -> list[str]:
        """See CheckpointBackend.names. Includes checkpoints that a failed overwrite has moved."""
        with translated(folder):
            try:
                names = self._system.listdir(folder)
            except (FileNotFoundError, NotADirectoryError):
                return []
        moved = {name for name in map(deletion.old_name, names) if name}
        return sorted({name for name in names if not name.startswith(".")} | moved)

    def sweep(self, folder: str) -> None:
        """See CheckpointBackend.sweep."""
        deletion.sweep(self._system, folder)

    def exists(self, path: str) -> bool:
        """See CheckpointBackend.exists."""
        return deletion.exists(self._system, path)

    def save(
        self,
        state: Any,
        path: str,
        *,
        asynchronous: bool,
        **options: Any,
    ) -> SaveHandle | None:
        """See CheckpointBackend.save."""
        if asynchronous:
            return api.async_save(state, path, storage=self._storage, **options)
        api.save(state, path, storage=self._storage, **options)
        return None

    def load(self, state: Any, path: str, **options: Any) -> LoadReport:
        """See CheckpointBackend.load."""
        return api.load(state, path, storage=self._storage, **options)

    def signature(self, path: str) -> Signature:
        """See CheckpointBackend.signature."""
        try:
            status = self._system.stat(os.path.join(path, MANIFEST_NAME))
        except FileNotFoundError:
            status = self._system.stat(os.path.join(hidden_path(path, "old"), MANIFEST_NAME))
        return signature_of(status)

    def record(self, path: str) -> Any:
        """See CheckpointBackend.record."""
        with api.open_checkpoint(path, storage=self._storage) as checkpoint:
            for shard in checkpoint.manifest.shards:
                check_size(checkpoint.files, shard)
            if f"{RECORD}.step" not in checkpoint:
                return None
            return checkpoint.load_state(keys=RECORD)[RECORD]

    def verify(self, path: str, *, quick: bool, progress: Callable[[int], None]) -> None:
        """See CheckpointBackend.verify."""
        with api.open_checkpoint(path, storage=self._storage) as checkpoint:
            if quick:
                for shard in checkpoint.manifest.shards:
                    check_size(checkpoint.files, shard)
            else:
                checkpoint.verify(progress=progress)

    def remove(self, path: str) -> None:
        """See CheckpointBackend.remove."""
        deletion.remove(self._system, path)
