"""Open a checkpoint of a handler in any format: shards, a single file, or component files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from shardckpt import api
from shardckpt.convert.single_files import (
    INDEX,
    is_one_file,
    is_single_file,
    read_many,
    read_one,
)
from shardckpt.errors import NotACheckpointError
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.nn_handler.saved import Saved, checked
from shardckpt.storage.base import MANIFEST_NAME, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import translated
from shardckpt.storage.resolve import resolve

__all__ = ["HandlerSource", "open_handler"]

_VALUES = ("config", "progress", "callbacks", "scheduler", "schedulers", "scaler", "ema.decay")


@dataclass(frozen=True, kw_only=True)
class HandlerSource:
    """A checkpoint of a handler in any format.

    Attributes:
        path: The checkpoint.
        storage: Its storage. A single file is a storage in memory.
        ranks: The values of each rank in a single file. None for a sharded checkpoint.
    """

    path: str
    storage: Storage
    ranks: list[Any] | None = None

    def values(self) -> Saved:
        """Read the values of a handler's checkpoint on this rank. Not collective."""
        found = api.load_state(self.path, keys=_VALUES, strict=False, storage=self.storage)
        config = found.get("config") if isinstance(found, dict) else None
        if not isinstance(config, dict) or "model" not in config:
            raise NotACheckpointError(
                "This checkpoint was not saved by an NNHandler",
                path=self.path,
                expected="the entry config.model",
                remedy="load its weights with NNHandler.initialize_from_checkpoint",
            )
        return checked(found, Saved, "", path=self.path)

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        with api.open_checkpoint(self.path, storage=self.storage) as checkpoint:
            return dict(checkpoint.tensors())

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of all tensors by name. Not collective."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of all tensors by name. Not collective."""
        return {name: tensor.dtype for name, tensor in self._tensors.items()}


def open_handler(path: str) -> HandlerSource:
    """Open a checkpoint of a handler: shards, a single file, or a directory of component files."""
    place = resolve(path)
    if not isinstance(place.storage, LocalStorage):
        return HandlerSource(path=place.path, storage=place.storage)
    if is_single_file(path):
        state = read_one(path)
    elif os.path.isfile(os.path.join(path, INDEX)):
        state = read_many(path)
    else:
        _refuse_folder(path)
        return HandlerSource(path=path, storage=LocalStorage())
    if not isinstance(state, Mapping):
        raise NotACheckpointError(
            "The file does not hold a dict",
            path=path,
            expected="a dict of tensors and values",
            actual=type(state).__name__,
            remedy="load it with torch.load, and save a dict of what it holds",
        )
    state = dict(state)
    ranks = state.pop("ranks", None) if "config" in state else None
    return HandlerSource(path=path, storage=StateStorage(state), ranks=ranks)


def _refuse_folder(path: str) -> None:
    """Raise NotACheckpointError for a folder that holds checkpoints."""
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, MANIFEST_NAME)):
        return
    with translated(path):
        inner = [os.path.join(path, name) for name in sorted(os.listdir(path))]
        found = [
            place
            for place in inner
            if is_one_file(place)
            or any(os.path.isfile(os.path.join(place, mark)) for mark in (MANIFEST_NAME, INDEX))
        ]
        if found:
            raise NotACheckpointError(
                "This folder is not a checkpoint, but contains checkpoints",
                path=path,
                actual=", ".join(os.path.basename(place) for place in found[:8]),
                remedy=f"give one of them: the newest is {max(found, key=os.path.getmtime)}",
            )
