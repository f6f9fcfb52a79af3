"""Saving a handler: as a sharded checkpoint by all ranks, or as files by rank 0."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Collection, Hashable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from shardckpt import api
from shardckpt.convert.single_files import (
    FileFormat,
    check_loads,
    check_suffix,
    is_one_file,
    is_single_file,
    read_many,
    read_one,
    write_many,
    write_one,
)
from shardckpt.coordination.base import Coordinator, WorkBroken
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.resolve import operation
from shardckpt.errors import RankFailedError, RankMismatchError, StateError
from shardckpt.io.devices import accelerator
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.manager.backends import RECORD
from shardckpt.nn_handler.emergency import is_consequence
from shardckpt.nn_handler.training_state import TrainingState
from shardckpt.reports import LoadReport
from shardckpt.saving.async_save import SaveHandle
from shardckpt.state.flatten import Ties
from shardckpt.state.module_state import has_state
from shardckpt.state.optimizer_state import plain_state
from shardckpt.storage.atomic_write import sweep_writes
from shardckpt.storage.paths import is_alias, local_path
from shardckpt.storage.posix import System, translated
from shardckpt.torch_compat import current_device, is_dtensor

__all__ = [
    "OneFile",
    "check_config",
    "check_suffix",
    "is_one_file",
    "link",
    "save_handler",
    "save_multi_files",
    "save_multi_from_single",
    "save_single_file",
    "save_single_from_multi",
    "state_on_all",
]


def save_handler(handler: TrainingState, path: str, *, overwrite: bool) -> None:
    """Save a handler. Collective. See NNHandler.save."""
    check_suffix(path)
    if is_one_file(path):
        save_single_file(handler, local_path(path), overwrite=overwrite)
    else:
        api.save(state_on_all(handler), path, overwrite=overwrite)


def state_on_all(handler: TrainingState, process_group: Any = None) -> dict[str, Any]:
    """Return the state of a handler. Collective.

    An error on one rank, such as one of a callback's state_dict, is raised on all ranks at once.
    """
    states: list[dict[str, Any]] = []

    def make() -> bytes:
        states.append(handler.state())
        return b""

    with operation("NNHandler: the state", process_group) as coordinator:
        exchange(coordinator, "state", make, lambda payloads: b"")
    return states[0]


def save_single_file(handler: TrainingState, path: str, *, overwrite: bool) -> None:
    """Save a handler as one file. Collective. See NNHandler.save_single_file."""
    if not is_one_file(path):
        raise StateError(
            "The suffix of a single file is missing or unknown",
            path=path,
            expected="a path that ends in .pth, .pt or .safetensors",
        )
    _save_gathered(
        handler.state,
        path,
        lambda s, progress: write_one(s, path, overwrite=overwrite, progress=progress),
    )


def save_multi_files(
    handler: TrainingState,
    folder: str,
    file_format: FileFormat,
    *,
    overwrite: bool,
    keys_to_save: Collection[str] | None = None,
) -> None:
    """Save a handler as one file for each component. Collective. See NNHandler.save_multi_files."""
    _check_format(file_format)
    _check_folder(folder)
    _save_gathered(
        handler.state,
        folder,
        lambda s, progress: write_many(
            _only(s, keys_to_save), folder, file_format, overwrite=overwrite, progress=progress
        ),
    )


def _check_folder(folder: str) -> None:
    """Raise StateError for a directory whose name has the suffix of a file."""
    if is_one_file(folder):
        raise StateError(
            "A directory with a file for each component has no suffix",
            path=folder,
            remedy="leave the suffix out, or call save_single_file",
        )


def _only(state: dict[str, Any], keys: Collection[str] | None) -> dict[str, Any]:
    """Return the components of a state that `keys` names."""
    if keys is None:
        return state
    unknown = [key for key in keys if key not in state]
    if unknown or isinstance(keys, str):
        raise StateError(
            "keys_to_save names components that the handler does not have",
            expected=f"a list of {', '.join(state)}",
            actual=repr(keys) if isinstance(keys, str) else ", ".join(map(repr, unknown)),
        )
    return {key: state[key] for key in keys}


def link(folder: str, name: str, target: str) -> None:
    """Make a name in a folder a symlink to another one, in place of an earlier symlink."""
    path = os.path.join(folder, name)
    with translated(path):
        if os.path.lexists(path) and not os.path.islink(path):
            raise FileExistsError(errno.EEXIST, "The name of the link is taken", path)
        temporary = os.path.join(folder, f".{name}.{os.getpid()}.link")
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        os.symlink(target, temporary)
        os.replace(temporary, path)


def save_multi_from_single(
    path: str, folder: str, file_format: FileFormat, *, overwrite: bool
) -> None:
    """Turn a single file into several. Not collective."""
    _check_format(file_format)
    _check_folder(folder)
    write_many(read_one(path), folder, file_format, overwrite=overwrite)


def save_single_from_multi(folder: str, path: str, *, overwrite: bool) -> None:
    """Turn several files into a single one. Not collective."""
    write_one(read_many(folder), path, overwrite=overwrite)


def _check_format(file_format: str) -> None:
    if file_format not in ("torch", "safetensors"):
        raise StateError(
            "Invalid value for file_format",
            expected='"torch" or "safetensors"',
            actual=repr(file_format),
        )


def check_config(handler: TrainingState, path: str) -> None:
    """Raise UnsupportedLeafError if a file of this kind can't hold an argument of a part."""
    if not path.endswith(".safetensors"):
        check_loads(handler.config(), path)


def _save_gathered(
    make: Callable[[], dict[str, Any]],
    path: str,
    write: Callable[[dict[str, Any], Callable[[int], None]], None],
    *,
    process_group: Any = None,
) -> None:
    """Gather the state of a handler on rank 0, which writes it. Collective.

    `make` returns the state. `write` gets the state without distributed tensors, and a function to
    call from time to time with the number of bytes written.
    """
    made: list[_GatheredState] = []

    def describe() -> bytes:
        made.append(_GatheredState(make()))
        return made[0].summary()

    def decide(payloads: list[bytes]) -> bytes:
        _check_alike(payloads)
        return msgspec.msgpack.encode(made[0].to_gather())

    with operation(f"save {path}", process_group) as coordinator:
        answer = exchange(coordinator, "state", describe, decide)
        (state,) = made
        names = msgspec.msgpack.decode(answer, type=list[str])
        if names:
            _gather(state, names, coordinator)

        def write_all(payloads: list[bytes]) -> bytes:
            ranks = [
                torch.load(io.BytesIO(p), weights_only=True, map_location="cpu") for p in payloads
            ]
            write({**state.full_state(), "ranks": ranks}, coordinator.progress)
            return b""

        exchange(coordinator, "write", state.own, write_all)


def _check_alike(payloads: list[bytes]) -> None:
    """Raise RankMismatchError if the ranks hold different distributed tensors.

    Their collectives would wait for each other.
    """
    for rank, payload in enumerate(payloads):
        if payload != payloads[0]:
            expected, actual = (
                dict(msgspec.msgpack.decode(text, type=list[tuple[str, str]]))
                for text in (payloads[0], payload)
            )
            name = next(iter(dict(expected.items() ^ actual.items())), None)
            raise RankMismatchError(
                "The ranks hold different distributed tensors, or in another order",
                rank=rank,
                tensor=name,
                expected=expected.get(name or ""),
                actual=actual.get(name or ""),
                remedy="save the same model on all ranks",
            )


def _gather(state: _GatheredState, names: list[str], coordinator: Coordinator) -> None:
    """Gather distributed tensors on rank 0, with collectives of their own groups. Collective."""

    def gather() -> bytes:
        try:
            coordinator.watch(lambda: state.gather(names, coordinator), phase="gather")
        except WorkBroken:
            return b"another rank failed"
        except (RuntimeError, dist.DistError) as error:
            if not is_consequence(error):
                raise
            return str(error).splitlines()[0].encode()
        return b""

    def decide(payloads: list[bytes]) -> bytes:
        broken = {rank: payload.decode() for rank, payload in enumerate(payloads) if payload}
        if broken:
            raise RankFailedError(
                "The collectives that gather the state broke",
                rank=tuple(broken),
                actual="; ".join(dict.fromkeys(broken.values())),
                remedy="look at the logs of the ranks, and at the network between them",
            )
        return b""

    exchange(coordinator, "gather", gather, decide)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """The place of a tensor in a state. `name` is the first one of the tensors in its memory."""

    name: str


class _GatheredState:
    """A state that is turned into plain CPU tensors on rank 0. Tied tensors stay tied."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._ranks = state.pop("ranks")
        self._ties = Ties()
        self._tensors: dict[str, torch.Tensor] = {}
        self._used: set[str] = set()
        self._state = self._read(plain_state(state), "")

    def _read(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            self._tensors[name] = value
            first = self._ties.first(value, name)
            self._used.add(first)
            return _Tensor(first)
        if isinstance(value, dict):
            return {key: self._read(item, f"{name}.{key}") for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._read(item, f"{name}.{i}") for i, item in enumerate(value))
        return self._read(value.state_dict(), name) if has_state(value) else value

    def summary(self) -> bytes:
        """Return the distributed tensors, which must be the same on all ranks."""
        found = [
            (name, f"{tensor.dtype} {list(tensor.shape)}")
            for name, tensor in self._tensors.items()
            if is_dtensor(tensor)
        ]
        return msgspec.msgpack.encode(found)

    def to_gather(self) -> list[str]:
        """Return the distributed tensors that rank 0 needs."""
        tensors = self._tensors
        return [n for n in tensors if n in self._used and is_dtensor(tensors[n])]

    @torch.no_grad()
    def gather(self, names: list[str], coordinator: Coordinator) -> None:
        """Replace distributed tensors by full CPU tensors on rank 0. Collective."""
        for name in names:
            tensor = self._tensors[name]
            assert is_dtensor(tensor)
            with _device_of(tensor.device):
                full = tensor.full_tensor()
                self._tensors[name] = full.cpu() if coordinator.rank == 0 else tensor
            coordinator.progress(0)

    def own(self) -> bytes:
        """Return the values of this rank."""
        buffer = io.BytesIO()
        torch.save(self._ranks.value, buffer)
        return buffer.getvalue()

    def full_state(self) -> Any:
        """Return the complete state. Called on rank 0 after `gather`."""
        plain = {name: _plain(self._tensors[name]) for name in self._used}
        return _filled(self._state, plain)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor without unused memory, as torch.save writes all memory of a tensor."""
    plain = tensor.detach().cpu()
    if plain.is_contiguous() and plain.untyped_storage().nbytes() == plain.nbytes:
        return plain
    return plain.clone(memory_format=torch.contiguous_format)


def _filled(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, _Tensor):
        return tensors[value.name]
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_filled(item, tensors) for item in value)
    return value


def _device_of(device: torch.device) -> Any:
    return current_device(device) if accelerator.owns(device) else nullcontext()


class OneFile:
    """Stores the checkpoints of a CheckpointManager as single files."""

    def names(self, folder: str) -> list[str]:
        """See CheckpointBackend.names."""
        found = os.listdir(folder) if os.path.isdir(folder) else []
        return sorted(n for n in found if not n.startswith(".") and not is_alias(folder, n))

    def sweep(self, folder: str) -> None:
        """See CheckpointBackend.sweep."""
        sweep_writes(System(), os.path.realpath(folder))

    def exists(self, path: str) -> bool:
        """See CheckpointBackend.exists."""
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
        """See CheckpointBackend.save. A file is written in full, and never in the background."""
        if asynchronous:
            raise StateError(
                "A single file is not saved in the background",
                path=path,
                remedy="leave out asynchronous=True, or the format",
            )
        _save_gathered(
            lambda: dict(state),
            path,
            lambda s, progress: write_one(s, path, overwrite=overwrite, progress=progress),
            process_group=process_group,
        )
        return None

    def load(self, state: Any, path: str, *, strict: bool, process_group: Any) -> LoadReport:
        """See CheckpointBackend.load."""
        storage = StateStorage(read_one(path))
        return api.load(state, path, strict=strict, process_group=process_group, storage=storage)

    def version(self, path: str) -> Hashable:
        """See CheckpointBackend.version."""
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size

    def record(self, path: str) -> Any:
        """See CheckpointBackend.record."""
        found = read_one(path, check=False) if is_single_file(path) else None
        return found.get(RECORD) if isinstance(found, dict) else None

    def verify(self, path: str, *, quick: bool, progress: Callable[[int], None]) -> None:
        """See CheckpointBackend.verify."""
        read_one(path)

    def remove(self, path: str) -> None:
        """See CheckpointBackend.remove."""
        with translated(path):
            os.unlink(path)
