"""Saving a handler: a sharded checkpoint, or one torch file."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import shardckpt
from shardckpt.coordination.base import exchange
from shardckpt.coordination.select import operation
from shardckpt.errors import StateError, UnsupportedLeafError
from shardckpt.planning.stateful import has_state, plain_state
from shardckpt.storage.local import remove_tree, sync_directory
from shardckpt.storage.system import System, translated

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = ["is_torch_file", "remove", "save"]


def is_torch_file(path: str) -> bool:
    """Whether a path means one torch file."""
    return path.endswith((".pth", ".pt"))


def save(handler: NNHandler, path: str, *, overwrite: bool) -> None:
    """Save a handler; collective. See NNHandler.save."""
    if is_torch_file(path):
        _save_torch_file(_whole(plain_state(handler.state()), ()), path, overwrite=overwrite)
    else:
        shardckpt.save(handler.state(), path, overwrite=overwrite)


def _whole(value: Any, path: tuple[Any, ...]) -> Any:
    """The state with whole CPU tensors in place of sharded ones; collective. What differs by rank
    is rank 0's."""
    if isinstance(value, shardckpt.PerRank):
        return _whole(value.value, path)
    if isinstance(value, DTensor):
        whole: torch.Tensor = value.full_tensor()
        return whole.detach().cpu()
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _whole(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_whole(item, (*path, index)) for index, item in enumerate(value))
    return _whole(value.state_dict(), path) if has_state(value) else value


def _save_torch_file(state: Any, path: str, *, overwrite: bool) -> None:
    def write() -> bytes:
        if not dist.is_initialized() or dist.get_rank() == 0:
            _write(state, path, overwrite=overwrite)
        return b""

    with operation(f"save {path}") as coordinator:
        exchange(coordinator, "write", write, lambda payloads: b"")


def _write(state: Any, path: str, *, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(path):
        raise StateError(
            "There is something at this path already", path=path, remedy="pass overwrite=True"
        )
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.tmp-{os.getpid()}")
    with translated(path):
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            _check_loads(temporary, path)
            os.replace(temporary, path)
            sync_directory(System(), folder)
        finally:
            if os.path.lexists(temporary):
                os.unlink(temporary)


def _check_loads(temporary: str, path: str) -> None:
    """What torch.load would refuse must be known now, not when it is needed."""
    try:
        torch.load(temporary, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        raise UnsupportedLeafError(
            "The state holds a value that torch.load(weights_only=True) refuses",
            path=path,
            actual=str(error).splitlines()[0],
            remedy="save to a path without .pth or .pt, or leave the value out",
        ) from error


def remove(path: str) -> None:
    """Remove a checkpoint, a directory or a file; what is not there is no error."""
    if os.path.isdir(path):
        remove_tree(System(), path)
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.unlink(path)
