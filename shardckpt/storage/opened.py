"""The open files of a checkpoint and its manifest. This module does not need torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from shardckpt.errors import CheckpointError, CheckpointNotFoundError, NotACheckpointError
from shardckpt.format.entries import Manifest
from shardckpt.format.manifest import check_text, from_bytes
from shardckpt.io.gc_pause import collector_paused
from shardckpt.logs import logger
from shardckpt.storage.base import CheckpointFiles, Storage
from shardckpt.storage.resolve import resolve

__all__ = ["OpenedCheckpoint", "age", "checkpoints_in"]

Opened = TypeVar("Opened", bound="OpenedCheckpoint")


class OpenedCheckpoint:
    """The files of a checkpoint and its manifest, without its tensors. Checkpoint extends it.

    Opening verifies the digest of the manifest. The first access to `manifest` parses it.

    Args:
        path: The checkpoint.
        storage: The storage of the checkpoint.

    Raises:
        CheckpointError: The checkpoint can't be read.
    """

    def __init__(self, path: str, *, storage: Storage, newest: bool = False) -> None:
        self._files = storage.open_newest(path) if newest else storage.open(path)
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

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _parsed(checkpoint: Opened) -> Opened:
    """Parse the manifest, which raises the errors of its form. Closes the checkpoint then."""
    try:
        _ = checkpoint.manifest
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def age(checkpoint: OpenedCheckpoint) -> tuple[str, list[tuple[str, int]], str]:
    """Return a key that sorts checkpoints by age, and those of one second by their numbers."""
    parts = re.findall(r"(\D*)(\d*)", checkpoint.path)
    numbers = [(text, int(number or -1)) for text, number in parts]
    return checkpoint.manifest.created, numbers, checkpoint.path


def checkpoints_in(
    path: Any,
    cls: type[Opened],
    *,
    on_error: Callable[[str, CheckpointError], None] = lambda name, error: None,
) -> Iterator[tuple[str, Opened]]:
    """Yield the checkpoints in a folder with their names, or the one at the path.

    Each is open until the next one is asked for. A warning is logged for each checkpoint that can't
    be read.

    Args:
        path: The folder, or the checkpoint.
        cls: The class of the open checkpoints.
        on_error: Called with the name and the error of each checkpoint that can't be read.

    Raises:
        CheckpointError: The folder has no checkpoint.
    """
    storage, folder = resolve(path)
    found = False
    for name in storage.names(folder):
        inner = storage.child(folder, name)
        try:
            checkpoint = _parsed(cls(inner, storage=storage))
        except (CheckpointNotFoundError, NotACheckpointError):
            continue
        except CheckpointError as error:
            logger.warning("%s is left out: %s", inner, error.message)
            on_error(name, error)
            continue
        found = True
        with checkpoint:
            yield name, checkpoint
    if not found:
        try:
            checkpoint = cls(folder, storage=storage)
        except CheckpointNotFoundError as error:
            error.expected = "a checkpoint, or a folder of checkpoints"
            error.remedy = "check the path"
            raise
        with checkpoint:
            yield folder.rstrip("/").rpartition("/")[2], checkpoint
