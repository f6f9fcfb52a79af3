"""Saving a handler: a sharded checkpoint by all ranks, or files for interchange by rank 0."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

import shardckpt
from shardckpt.convert.whole_files import (
    FileFormat,
    check_loads,
    is_one_file,
    read_many,
    read_one,
    write_many,
    write_one,
)
from shardckpt.coordination.base import exchange
from shardckpt.coordination.resolve import operation
from shardckpt.errors import StateError
from shardckpt.loading.memory_checkpoint import MemoryStorage
from shardckpt.manager.backends import RECORD, Signature, signature_of
from shardckpt.reports import LoadReport
from shardckpt.saving.async_save import SaveHandle
from shardckpt.state.flatten import Ties
from shardckpt.state.module_state import has_state, plain_state
from shardckpt.storage.posix import translated

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = [
    "OneFile",
    "check_config",
    "is_one_file",
    "save",
    "save_multi_files",
    "save_multi_from_single",
    "save_single_file",
    "save_single_from_multi",
]


def save(handler: NNHandler, path: str, *, overwrite: bool) -> None:
    """Save a handler; collective. See NNHandler.save."""
    if is_one_file(path):
        save_single_file(handler, path, overwrite=overwrite)
    else:
        shardckpt.save(handler.state(), path, overwrite=overwrite)


def save_single_file(handler: NNHandler, path: str, *, overwrite: bool) -> None:
    """Save a handler as one file; collective. See NNHandler.save_single_file."""
    if not is_one_file(path):
        raise StateError(
            "This path does not say which kind of file to write",
            path=path,
            expected="a path that ends in .pth, .pt or .safetensors",
        )
    _save_whole(handler.state(), path, lambda s: write_one(s, path, overwrite=overwrite))


def save_multi_files(
    handler: NNHandler, folder: str, file_format: FileFormat, *, overwrite: bool
) -> None:
    """Save a handler as one file a component; collective. See NNHandler.save_multi_files."""
    _check_format(file_format)
    _save_whole(
        handler.state(), folder, lambda s: write_many(s, folder, file_format, overwrite=overwrite)
    )


def save_multi_from_single(
    path: str, folder: str, file_format: FileFormat, *, overwrite: bool
) -> None:
    """Turn a single file into several. Not collective."""
    _check_format(file_format)
    write_many(read_one(path), folder, file_format, overwrite=overwrite)


def save_single_from_multi(folder: str, path: str, *, overwrite: bool) -> None:
    """Turn several files into a single one. Not collective."""
    write_one(read_many(folder), path, overwrite=overwrite)


def _check_format(file_format: str) -> None:
    if file_format not in ("torch", "safetensors"):
        raise StateError(
            "Unknown value for file_format",
            expected='"torch" or "safetensors"',
            actual=repr(file_format),
        )


def check_config(handler: NNHandler, path: str) -> None:
    """Raise UnsupportedLeafError if an argument of a part can't stand in a file of this kind."""
    if not path.endswith(".safetensors"):
        buffer = io.BytesIO()
        torch.save(handler.config(), buffer)
        buffer.seek(0)
        check_loads(buffer, path)


def _save_whole(
    state: dict[str, Any],
    path: str,
    write: Callable[[dict[str, Any]], None],
    *,
    process_group: Any = None,
) -> None:
    """Gather a handler's state and have rank 0 write it; collective."""
    ranks = state.pop("ranks")
    whole = _Whole().of(plain_state(state))

    def send() -> bytes:
        buffer = io.BytesIO()
        torch.save(ranks.value, buffer)
        return buffer.getvalue()

    def decide(payloads: list[bytes]) -> bytes:
        every = [torch.load(io.BytesIO(payload), weights_only=True) for payload in payloads]
        write({**whole, "ranks": every})
        return b""

    with operation(f"save {path}", process_group) as coordinator:
        exchange(coordinator, "write", send, decide)


class _Whole:
    """Makes whole CPU copies of tensors, tied ones still tied."""

    def __init__(self) -> None:
        self.ties = Ties()
        self.copies: dict[str, torch.Tensor] = {}

    def of(self, value: Any, name: str = "") -> Any:
        """A nested state with copies in place of its tensors; collective."""
        if isinstance(value, torch.Tensor):
            first = self.ties.first(value, name)
            if first not in self.copies:
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                copy = whole.detach().cpu().clone(memory_format=torch.contiguous_format)
                self.copies[first] = copy
            return self.copies[first]
        if isinstance(value, dict):
            return {key: self.of(item, f"{name}.{key}") for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.of(item, f"{name}.{i}") for i, item in enumerate(value))
        return self.of(value.state_dict(), name) if has_state(value) else value


class OneFile:
    """Single files as a CheckpointManager's checkpoints; see shardckpt.manager.backends.Format."""

    def names(self, folder: str) -> list[str]:
        """See Format.names."""
        found = os.listdir(folder) if os.path.isdir(folder) else []
        return sorted(name for name in found if not name.startswith("."))

    def sweep(self, folder: str) -> None:
        """See Format.sweep. Files being written have no lock: nobody knows which are dead."""

    def exists(self, path: str) -> bool:
        """See Format.exists."""
        return os.path.lexists(path)

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
        """See Format.save. Files are written whole."""
        _save_whole(
            dict(state),
            path,
            lambda s: write_one(s, path, overwrite=overwrite),
            process_group=process_group,
        )
        return None

    def load(self, state: Any, path: str, *, strict: bool, process_group: Any) -> LoadReport:
        """See Format.load."""
        storage = MemoryStorage(read_one(path))
        return shardckpt.load(
            state, path, strict=strict, process_group=process_group, storage=storage
        )

    def signature(self, path: str) -> Signature:
        """See Format.signature."""
        return signature_of(os.stat(path))

    def record(self, path: str) -> Any:
        """See Format.record."""
        found = read_one(path, check=False) if is_one_file(path) else None
        return found.get(RECORD) if isinstance(found, dict) else None

    def verify(self, path: str, *, quick: bool, progress: Callable[[int], None]) -> None:
        """See Format.verify."""
        read_one(path)

    def remove(self, path: str) -> None:
        """See Format.remove."""
        with translated(path):
            os.unlink(path)
