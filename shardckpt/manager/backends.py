"""Backends of CheckpointManager, which store its checkpoints. The default writes shards."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from shardckpt import api
from shardckpt.checkpoint import Checkpoint
from shardckpt.loading.shard_reader import check_size
from shardckpt.reports import LoadReport
from shardckpt.saving.async_save import SaveHandle
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage

__all__ = ["RECORD", "CheckpointBackend", "ShardedBackend"]

RECORD = "checkpoint_manager"
"""The key of the entry with a checkpoint's label, owner, step, metrics and time."""


class CheckpointBackend(Protocol):
    """The interface of a backend, which stores the checkpoints of a manager.

    Methods raise CheckpointError for corrupted checkpoints, and StorageError.
    """

    def names(self, folder: str) -> list[str]:
        """List the names in a folder that may be checkpoints; see Storage.names."""

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

    def version(self, path: str) -> Hashable:
        """Return a value that changes when the checkpoint is replaced, without reading shards."""

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
    """Checkpoints of shards in a storage; see CheckpointBackend."""

    def __init__(self, storage: Storage | None = None) -> None:
        self._storage = storage or LocalStorage()

    def names(self, folder: str) -> list[str]:
        """See CheckpointBackend.names."""
        return self._storage.names(folder)

    def sweep(self, folder: str) -> None:
        """See CheckpointBackend.sweep."""
        self._storage.sweep(folder)

    def exists(self, path: str) -> bool:
        """See CheckpointBackend.exists."""
        return self._storage.exists(path)

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

    def version(self, path: str) -> Hashable:
        """See CheckpointBackend.version."""
        return self._storage.version(path)

    def record(self, path: str) -> Any:
        """See CheckpointBackend.record."""
        with Checkpoint(path, storage=self._storage) as checkpoint:
            for shard in checkpoint.manifest.shards:
                check_size(checkpoint.files, shard)
            if f"{RECORD}.step" not in checkpoint:
                return None
            return checkpoint.load_state(keys=RECORD)[RECORD]

    def verify(self, path: str, *, quick: bool, progress: Callable[[int], None]) -> None:
        """See CheckpointBackend.verify."""
        with Checkpoint(path, storage=self._storage) as checkpoint:
            shards = checkpoint.manifest.shards
            # Shards that other machines hold can't be read here until they are copied.
            if quick or any(checkpoint.files.elsewhere(shard.name) for shard in shards):
                for shard in shards:
                    check_size(checkpoint.files, shard)
            else:
                checkpoint.verify(progress=progress)

    def remove(self, path: str) -> None:
        """See CheckpointBackend.remove."""
        self._storage.remove(path)
