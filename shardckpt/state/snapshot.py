"""Snapshots: a state as it is at one moment, taken in a millisecond or two and staged later.

A snapshot copies values and containers, and the tensors that may change before the next optimizer
step: buffers of modules, which forward changes, arrays, and small tensors outside modules.
Parameters, optimizer state and large tensors are held without a copy, with their version. The
staging later detects a change by the version.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from shardckpt.errors import StateError
from shardckpt.format.dtypes import memory_view
from shardckpt.format.typed_json import Record, record_of
from shardckpt.io.tensor_memory import owns_memory
from shardckpt.state.file_groups import frozen_entries
from shardckpt.state.flatten import FlatState
from shardckpt.state.local_chunks import PLAIN, LocalChunk, Shards, plain_data
from shardckpt.state.markers import FromRank0, PerRank, Union
from shardckpt.state.module_state import (
    ModuleState,
    ddp_rank0_buffers,
    has_state,
    instances_in,
    modules_in,
    named_state,
)
from shardckpt.state.optimizer_state import OptimizerState, ParameterNames, optimizer_state
from shardckpt.state.refusals import reading_state
from shardckpt.state.sharded_array import ShardedArray
from shardckpt.state.wrapper_tensors import Wrapped, saveable_form
from shardckpt.torch_compat import (
    change_count,
    dtensor,
    dtensor_class,
    dtensor_local,
    is_parameter,
    spec_of,
)

__all__ = ["Snapshot", "take_snapshot"]

_DEPTH_LIMIT = 120  # more than flatten allows, which raises the error
_NEVER = -1.0


@dataclass(slots=True)
class Snapshot:
    """A snapshot of a state.

    Attributes:
        state: Nested containers of values and tensors. Modules and optimizers are replaced by their
            state.
        held: The version and address of each tensor that was not copied, by the id of the tensor.
    """

    state: Any = None
    held: dict[int, tuple[int, int]] = field(default_factory=dict)

    def changed(self, flat: FlatState) -> str | None:
        """Return the name of a held tensor that has changed since the snapshot, or None.

        Detects changes through torch, but not through `.data`, numpy or other libraries.
        """
        for name, tensor in (*flat.tensors.items(), *flat.rank_only.items()):
            data = [c.data for c in tensor.chunks] if isinstance(tensor, Shards) else [tensor]
            for held in data:
                mark = self.held.get(id(held))
                if mark is not None and isinstance(held, torch.Tensor) and mark != _mark(held):
                    return name
        return None


def take_snapshot(state: Any, *, small_bytes: int, rank: int = 0) -> Snapshot:
    """Take a snapshot of a rank's state. Not collective; changes nothing.

    Raises the errors of the state_dict of modules, optimizers and objects.

    Args:
        state: The state.
        small_bytes: The size up to which tensors outside modules are copied.
        rank: This rank.
    """
    with torch.no_grad():
        taker = _Taker(state, rank)
        taker.snapshot.state = taker.walk(state, "", copy_up_to=small_bytes)
    return taker.snapshot


class _Taker:
    def __init__(self, state: Any, rank: int) -> None:
        self.state = state
        self.rank = rank
        self.snapshot = Snapshot()
        self.modules = list(modules_in(state))
        # With each copy its original, as the memory and the id of a freed object are used again.
        self.copies: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.arrays: dict[int, tuple[Any, Any]] = {}
        # Modules come first, so that the copies of their tensors are found for tied entries.
        self.named = {id(module): named_state(module, at=at) for at, module in self.modules}
        self.read = {id(module): self.module(module, f".{at}") for at, module in self.modules}

    @cached_property
    def parameters(self) -> set[tuple[Any, ...]]:
        parameters = (p for _, module in self.modules for p in module.parameters())
        return {_memory(p, _local(p)) for p in parameters}

    @cached_property
    def optimizer_memory(self) -> set[Any]:
        """The first elements of the keys of the state of all optimizers."""
        optimizers = (optimizer for _, optimizer in instances_in(self.state, Optimizer))
        tensors = (
            t for o in optimizers for _, t in instances_in([*o.state.values()], torch.Tensor)
        )
        return {_memory(tensor, _local(tensor))[0] for tensor in tensors}

    def walk(self, value: Any, at: str, *, copy_up_to: float, depth: int = 0) -> Any:
        """Return a value with copied containers and values, and its tensors copied or held."""
        if isinstance(value, torch.Tensor):
            return self.take(value, copy_up_to)
        if value is None or isinstance(value, (str, int, float, torch.Size)):
            return value
        if depth > _DEPTH_LIMIT:
            return value
        if isinstance(value, (set, bytearray, Counter)):
            return value.copy()
        if isinstance(value, io.BytesIO):
            return io.BytesIO(value.getvalue())
        if isinstance(value, Mapping):
            return {
                key: self.walk(item, f"{at}.{key}", copy_up_to=copy_up_to, depth=depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple, deque)):
            items = [
                self.walk(item, f"{at}.{i}", copy_up_to=copy_up_to, depth=depth + 1)
                for i, item in enumerate(value)
            ]
            if isinstance(value, deque):
                return deque(items, value.maxlen)
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, (np.ndarray, ShardedArray)):
            if id(value) not in self.arrays:
                self.arrays[id(value)] = value, value.copy()
            return self.arrays[id(value)][1]
        if isinstance(value, nn.Module):
            return self.read.get(id(value)) or self.module(value, at)
        if isinstance(value, Optimizer):
            names = ParameterNames(self.modules, read=self.named)
            state = optimizer_state(value, names, at=at.removeprefix("."))
            return OptimizerState(self.optimizer(state, at))
        if isinstance(value, PerRank):
            inner = self.walk(value.value, at, copy_up_to=copy_up_to, depth=depth)
            return PerRank(inner, value.on_resize)
        if isinstance(value, FromRank0):
            if self.rank:
                return FromRank0(None)
            return FromRank0(self.walk(value.value, at, copy_up_to=copy_up_to, depth=depth))
        if isinstance(value, Union):
            return Union(self.walk(value.value, at, copy_up_to=copy_up_to, depth=depth))
        if has_state(value):
            with reading_state(value, at=at.removeprefix(".")):
                state = value.state_dict()
            self.modules += modules_in(state, at=at.removeprefix("."))
            return self.walk(state, at, copy_up_to=copy_up_to, depth=depth)
        if isinstance(value, torch.Generator):
            return value.get_state()
        if isinstance(value, io.BytesIO):
            return io.BytesIO(value.getvalue())
        if isinstance(value, io.StringIO):
            return io.StringIO(value.getvalue(), newline="")
        if isinstance(value, memoryview):
            return bytes(value)
        record = record_of(value)
        if record is not None:
            fields = self.walk(dict(record), at, copy_up_to=copy_up_to, depth=depth)
            return Record(record.type_name, fields)
        return value

    def module(self, module: nn.Module, at: str) -> ModuleState:
        entries = (
            self.named.get(id(module)) or named_state(module, at=at.removeprefix("."))
        ).by_name()
        plain = True  # the module has only trained weights
        for key, item in entries.items():
            if is_parameter(item):
                plain = plain and item.requires_grad
                entries[key] = self.hold(item)
            else:  # it may change in forward, as running statistics do
                plain = False
                entries[key] = self.walk(item, f"{at}.{key}", copy_up_to=math.inf)
        if plain:
            return ModuleState(entries, frozenset(), frozenset())
        return ModuleState(entries, frozen_entries(module), ddp_rank0_buffers(module))

    def optimizer(self, state: dict[Any, Any], at: str) -> dict[Any, Any]:
        """Take an optimizer's state dict: copy the groups, which schedulers change, and hold the
        rest.
        """
        taken: dict[Any, Any] = {}
        for key, item in state.items():
            if key == "state" and type(item) is dict:
                taken[key] = self.held_state(item, at)
            elif key == "param_groups":
                taken[key] = self.walk(item, at, copy_up_to=math.inf)
            elif type(item) is dict:
                taken[key] = self.optimizer(item, at)
            else:
                taken[key] = self.walk(item, at, copy_up_to=_NEVER)
        return taken

    def held_state(self, state: dict[Any, Any], at: str) -> dict[Any, Any]:
        """Hold an optimizer's state by parameter, which only a step changes."""
        return {
            name: {
                key: self.hold(item)
                if isinstance(item, torch.Tensor)
                else self.walk(item, at, copy_up_to=_NEVER)
                for key, item in own.items()
            }
            if type(own) is dict
            else self.walk(own, at, copy_up_to=_NEVER)
            for name, own in state.items()
        }

    def take(self, tensor: torch.Tensor, copy_up_to: float) -> Any:
        """Copy a tensor of up to `copy_up_to` bytes that is not a parameter. Hold any other
        tensor.
        """
        data = None if copy_up_to < 0 else plain_data(tensor)
        if data is None:
            return self.hold(tensor, copy_up_to)
        large = tensor.numel() * tensor.element_size() > copy_up_to
        if large and not self.modules:  # it can't be tied to a large buffer, which is copied
            return self.hold(tensor)
        memory = _memory(tensor, data)
        if memory not in self.copies:  # tied tensors stay tied
            if large or memory in self.parameters:
                return self.hold(tensor)
            if copy_up_to < math.inf and memory[0] in self.optimizer_memory:
                return self.hold(tensor)
            self.copies[memory] = tensor, _copy(tensor, data)
        return self.copies[memory][1]

    def hold(self, tensor: torch.Tensor, copy_up_to: float = _NEVER) -> Any:
        """Hold a tensor with its version. The inner tensors of others are held or copied."""
        if plain_data(tensor) is None:
            try:
                split = saveable_form(tensor, name="")
            except StateError:
                return tensor  # flatten raises the error, with the name
            if isinstance(split, Wrapped):
                inner = {key: self.inner(item, copy_up_to) for key, item in split.inner.items()}
                return dataclasses.replace(split, inner=inner)
            if isinstance(split, Shards):
                return self.inner(split, copy_up_to)
            if type(tensor) not in PLAIN and type(tensor) is not dtensor_class():
                return tensor  # it can't be saved, or flatten handles its class
        if tensor.is_inference():  # it has no version
            return _copy(tensor, _local(tensor))
        if type(tensor) is not dtensor_class():  # the detach() of a DTensor is slow
            tensor = tensor.detach()  # does not change with `parameter.data = ...`
        self.snapshot.held[id(tensor)] = _mark(tensor)
        return tensor

    def inner(self, inner: Any, copy_up_to: float) -> Any:
        """Take one of the inner tensors or shards of another tensor."""
        if not isinstance(inner, Shards):
            return self.take(inner, copy_up_to)
        chunks = [
            LocalChunk(chunk.offsets, chunk.sizes, self.take(chunk.data, copy_up_to))
            for chunk in inner.chunks
        ]
        return dataclasses.replace(inner, chunks=chunks)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local part of a DTensor, and any other tensor itself."""
    return dtensor_local(tensor) if type(tensor) is dtensor_class() else tensor


def _copy(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Copy a tensor, whose data on this rank are `local`, without gradients. A tensor without
    memory is returned itself; flatten raises.
    """
    if local.is_meta or (local.layout is torch.strided and not owns_memory(local)):
        return tensor
    plain = memory_view(local)
    copied = plain.clone() if plain is local else plain.clone().view(local.dtype)
    return copied if local is tensor else dtensor(copied, spec_of(tensor))


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    local = _local(tensor)
    return change_count(tensor), 0 if local is tensor else local.data_ptr()


def _memory(tensor: torch.Tensor, local: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tied tensors. `local` are the tensor's data on this rank."""
    if not owns_memory(local) or not local.numel():
        return (id(tensor),)
    view = (local.dtype, local.shape, local.stride(), local.is_conj(), local.is_neg())
    return (local.data_ptr(), *view, tensor.shape)
