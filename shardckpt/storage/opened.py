"""The open files of a checkpoint and its manifest. This module does not need torch."""

from __future__ import annotations

import functools
from typing import TypeVar

from shardckpt.format.entries import Manifest
from shardckpt.format.manifest import check_text, from_bytes
from shardckpt.io.gc_pause import collector_paused
from shardckpt.storage.base import CheckpointFiles, Storage

__all__ = ["OpenedCheckpoint"]

Self = TypeVar("Self", bound="OpenedCheckpoint")


class OpenedCheckpoint:
    """The files of a checkpoint and its manifest, without its tensors. Checkpoint extends it.

    Opening verifies the digest of the manifest. The first access to `manifest` parses it.

    Args:
        path: The checkpoint.
        storage: The storage of the checkpoint.

    Raises:
        CheckpointError: The checkpoint can't be read.
    """

    def __init__(self, path: str, *, storage: Storage) -> None:
        self._files = storage.open(path)
        try:
            self._text = self._files.manifest()
            check_text(self._text, path=self._files.path)
        except BaseException:
            self._files.close()
            raise

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The parsed manifest.

        Raises:
            CorruptionError: The manifest violates the format.
        """
        with collector_paused():
            return from_bytes(self._text, path=self.path)

    @property
    def path(self) -> str:
        """The path of the checkpoint."""
        return self._files.path

    @property
    def files(self) -> CheckpointFiles:
        """The files, for tools that read shards themselves."""
        return self._files

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.close()
