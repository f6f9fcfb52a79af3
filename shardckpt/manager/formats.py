"""What a CheckpointManager does with one checkpoint: a directory of shards, by default."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import shardckpt
from shardckpt.execution.background import SaveHandle
from shardckpt.execution.reader import check_size
from shardckpt.reports import LoadReport
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.local import remove_tree
from shardckpt.storage.system import System

__all__ = ["RECORD", "Format", "Sharded"]

RECORD = "checkpoint_manager"
"""The key under which a managed checkpoint says its label, step, metrics and time."""


class Format(Protocol):
    """How a manager's checkpoints are stored. Broken ones raise CheckpointError or StorageError."""

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

    def marker(self, path: str) -> str:
        """The file that is another one, or has another time, when the checkpoint is another."""

    def record(self, path: str) -> Any:
        """What was saved under RECORD, of a checkpoint that looks whole; None without one."""

    def verify(self, path: str, *, quick: bool, progress: Callable[[int], None]) -> None:
        """Raise if the checkpoint is broken."""

    def remove(self, path: str) -> None:
        """Remove the checkpoint, as far as that works."""


class Sharded:
    """Directories of shards; see Format."""

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
        options: Any = {"overwrite": overwrite, "process_group": process_group, "base": base}
        if asynchronous:
            return shardckpt.async_save(state, path, **options)
        shardckpt.save(state, path, **options)
        return None

    def load(self, state: Any, path: str, *, strict: bool, process_group: Any) -> LoadReport:
        """See Format.load."""
        return shardckpt.load(state, path, strict=strict, process_group=process_group)

    def marker(self, path: str) -> str:
        """See Format.marker."""
        return os.path.join(path, MANIFEST_NAME)

    def record(self, path: str) -> Any:
        """See Format.record."""
        with shardckpt.open_checkpoint(path) as checkpoint:
            for shard in checkpoint.manifest.shards:
                check_size(checkpoint.files, shard)
            if f"{RECORD}.step" not in checkpoint:
                return None
            return checkpoint.load_state(keys=RECORD)[RECORD]

    def verify(self, path: str, *, quick: bool, progress: Callable[[int], None]) -> None:
        """See Format.verify."""
        with shardckpt.open_checkpoint(path) as checkpoint:
            if quick:
                for shard in checkpoint.manifest.shards:
                    check_size(checkpoint.files, shard)
            else:
                checkpoint.verify(progress=progress)

    def remove(self, path: str) -> None:
        """See Format.remove."""
        remove_tree(System(), path)
