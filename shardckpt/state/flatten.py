"""A nested state, flattened: named tensors, and a tree of everything else.

    {"model": {"w": tensor, "tied": tensor}, "step": 7}

becomes

    tensors: {"model.w": tensor}
    tree:    {"model": {"w": {"$tensor": "model.w"}, "tied": {"$tensor": "model.w"}}, "step": 7}

Names join the keys of the path with dots. A tensor that appears twice (the same memory
seen in the same way) is kept once; both places refer to it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from shardckpt.errors import StateError, UnsupportedLeafError
from shardckpt.format import typed_json as values
from shardckpt.state.file_groups import OPTIMIZER, frozen_entries, kind_of
from shardckpt.state.local_chunks import check_dense, local_tensor
from shardckpt.state.module_state import (
    ModuleState,
    OptimizerState,
    foreign_buffers,
    has_state,
    module_state,
    modules_in,
    optimizer_state,
    parameter_names,
)
from shardckpt.state.sharded_array import ShardedArray, from_numpy

__all__ = ["FlatState", "PerRank", "Ties", "flatten"]

_DEPTH_LIMIT = 100


@dataclass(frozen=True, slots=True)
class PerRank:
    """Marks a part of the state that differs by rank: random-number state, loader position.

    Every rank's own value is saved. On load by as many ranks as saved, each gets its own
    back. On another number of ranks `on_resize` says what happens: "keep" leaves what the
    state holds (and the report names it), "wrap" takes the value of rank % saved world
    size, "error" raises, and a function is called with the list of all saved values, in
    rank order, and returns this rank's.
    """

    value: Any
    on_resize: Literal["keep", "wrap", "error"] | Callable[[list[Any]], Any] = "keep"


@dataclass(slots=True, kw_only=True)
class FlatState:
    """A flattened state: what flatten returns.

    `tensors`: name -> tensor that every rank has (some may hold no part of it). `own`:
    name -> tensor of this rank alone, from inside PerRank. `foreign`: names among `tensors`
    whose values are those of another rank. `kinds`: name -> kind of the tensors whose kind
    (see planning/kinds) is not MAIN. `tree`: the typed JSON of the state, equal on every
    rank. `own_trees`: the typed JSON of the PerRank values.
    """

    tensors: dict[str, torch.Tensor | ShardedArray] = field(default_factory=dict)
    own: dict[str, torch.Tensor | ShardedArray] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)
    kinds: dict[str, int] = field(default_factory=dict)
    tree: Any = None
    own_trees: list[Any] = field(default_factory=list)


def flatten(state: Any, *, rank: int) -> FlatState:
    """Flatten a nested state; modules, optimizers and objects with state_dict are asked for theirs.

    Not collective, changes nothing. Raises UnsupportedLeafError naming the path of a leaf
    that can't be saved, StateError where two entries have the same name.
    """
    flattener = _Flattener(state, rank=rank)
    try:
        with torch.no_grad():  # to_local() is free then
            flattener.flat.tree = flattener.walk(state, "", 0)
    except RecursionError as error:  # sets in sets: all else is counted on the way
        raise _too_deep("") from error
    return flattener.flat


class _Flattener:
    def __init__(self, state: Any, *, rank: int) -> None:
        self.flat = FlatState()
        self.rank = rank
        self.state = state
        self.inside_per_rank = False
        self.ties, self.own_ties = Ties(), Ties()
        self.names: set[str] = set()
        self.frozen_modules = 0
        self._parameter_names: dict[int, str] | None = None

    def walk(self, value: Any, name: str, depth: int) -> Any:
        """The typed JSON of the value at `name`, with references where tensors stand."""
        if isinstance(value, torch.Tensor):
            return values.reference("tensor", self.add(value, name))
        if isinstance(value, Mapping) and not isinstance(value, Counter):
            self.take(name)
            self.check_depth(name, depth)
            items = [
                (key, self.walk(item, f"{name}.{key}" if name else str(key), depth + 1))
                for key, item in value.items()
            ]
            return values.mapping(items, at=name)
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            self.take(name)
            self.check_depth(name, depth)
            nodes = [
                self.walk(item, f"{name}.{index}" if name else str(index), depth + 1)
                for index, item in enumerate(value)
            ]
            return nodes if isinstance(value, list) else {"$tuple": nodes}
        if isinstance(value, np.ndarray):
            return values.reference("numpy", self.add(from_numpy(value, name=name), name))
        if isinstance(value, ShardedArray):
            return values.reference(value.kind, self.add(self.sharded(value, name), name))
        if isinstance(value, nn.Module):
            value = ModuleState(module_state(value), frozen_entries(value), foreign_buffers(value))
        if isinstance(value, ModuleState):
            return self.module(value, name, depth)
        if isinstance(value, Optimizer):
            value = OptimizerState(optimizer_state(value, self.parameter_names(), at=name))
        if isinstance(value, OptimizerState):
            before = len(self.flat.tensors)
            node = self.walk(value.entries, name, depth)
            added = itertools.islice(self.flat.tensors, before, None)
            self.flat.kinds.update(dict.fromkeys(added, OPTIMIZER))
            return node
        if isinstance(value, PerRank):
            return self.per_rank(value, name, depth)
        if has_state(value):
            return self.walk(value.state_dict(), name, depth)
        self.take(name)
        return values.encode(value, at=name)

    def module(self, module: ModuleState, name: str, depth: int) -> Any:
        before = len(self.flat.tensors)
        node = self.walk(module.entries, name, depth)
        below = f"{name}." if name else ""
        frozen = {f"{below}{own}" for own in module.frozen}
        self.flat.foreign.update(f"{below}{own}" for own in module.foreign)
        added = [n for n in itertools.islice(self.flat.tensors, before, None) if n in frozen]
        if added:
            self.flat.kinds.update(dict.fromkeys(added, kind_of(self.frozen_modules)))
            self.frozen_modules += 1
        return node

    def take(self, name: str) -> None:
        """Note the name of an entry, which no other has: loads go by names."""
        if self.inside_per_rank:
            name = f"{name}@rank{self.rank}"
        if name in self.names:
            raise StateError(
                "Two entries of the state have the same name",
                tensor=name,
                expected="different names: the keys of the path, joined with dots",
                actual="the same name on two paths",
                remedy="rename a key",
            )
        self.names.add(name)

    def add(self, tensor: torch.Tensor | ShardedArray, name: str) -> str:
        """Take a tensor; the name that it is saved under, another one if it is tied."""
        if not name:
            raise StateError(
                "A tensor by itself has no name", remedy='put it into a dict: {"name": tensor}'
            )
        self.take(name)
        if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
            raise StateError(
                "The name of a tensor is no valid text",
                tensor=ascii(name),
                expected="Unicode without lone surrogates",
                remedy="rename the key",
            )
        check_dense(tensor.tensor if isinstance(tensor, ShardedArray) else tensor, name=name)
        if tensor.is_meta:
            raise UnsupportedLeafError(
                "A tensor on the meta device holds no data",
                tensor=name,
                expected="a tensor with data",
                actual="device meta",
                remedy="materialise it first: to_empty(), or load a checkpoint into it",
            )
        ties, tensors = self.ties, self.flat.tensors
        if self.inside_per_rank:
            name, ties, tensors = f"{name}@rank{self.rank}", self.own_ties, self.flat.own
        first = ties.first(tensor, name)
        if first == name:
            tensors[name] = tensor
        return first

    def sharded(self, value: ShardedArray, name: str) -> ShardedArray:
        if self.inside_per_rank:
            raise StateError(
                "A ShardedArray inside PerRank",
                tensor=name,
                remedy="put it beside: it knows that the ranks hold different parts",
            )
        return value.check(name)

    def per_rank(self, value: PerRank, name: str, depth: int) -> Any:
        if self.inside_per_rank:
            raise StateError("PerRank inside PerRank", tensor=name, remedy="mark it once")
        self.inside_per_rank = True
        self.flat.own_trees.append(self.walk(value.value, name, depth))
        self.inside_per_rank = False
        return values.reference("per_rank", str(len(self.flat.own_trees) - 1))

    def parameter_names(self) -> dict[int, str]:
        if self._parameter_names is None:
            self._parameter_names = parameter_names(modules_in(self.state))
        return self._parameter_names

    def check_depth(self, name: str, depth: int) -> None:
        if depth > _DEPTH_LIMIT:
            raise _too_deep(f"{name[:80]}...")


def _too_deep(name: str) -> UnsupportedLeafError:
    return UnsupportedLeafError(
        "The state is nested too deeply, or contains itself",
        tensor=name,
        expected=f"at most {_DEPTH_LIMIT} levels",
        remedy="flatten it, or break the cycle",
    )


class Ties:
    """Tells which tensors are the same memory seen in the same way."""

    def __init__(self) -> None:
        # Most tensors begin where no other does: all else about them is looked at only if not.
        self._at: dict[int, tuple[torch.Tensor, str]] = {}
        self._same: dict[tuple[Any, ...], str] = {}

    def first(self, tensor: torch.Tensor | ShardedArray, name: str) -> str:
        """The name under which this tensor came first: `name`, if it is new."""
        if isinstance(tensor, ShardedArray):  # ranks may have no part of it, or any
            return self._same.setdefault((id(tensor),), name)
        local = local_tensor(tensor)
        if local is not None and (address := local.data_ptr()):  # 0: it has no elements
            return self.first_at(address, tensor, name)
        return self._same.setdefault(_memory_key(tensor), name)

    def first_at(self, address: int, tensor: torch.Tensor, name: str) -> str:
        """As `first` for a tensor whose memory begins there."""
        other, known = self._at.setdefault(address, (tensor, name))
        if other is tensor:
            return known
        self._same.setdefault(_memory_key(other), known)
        return self._same.setdefault(_memory_key(tensor), name)


def _memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same memory seen in the same way.

    The storage is known by its address as an object, which even empty local shards have.
    """
    local = local_tensor(tensor)
    if local is None:
        return (id(tensor),)
    layout: tuple[Any, ...] = ()
    if local is not tensor:
        layout = (tensor.shape, tensor.placements, tensor.device_mesh)  # type: ignore[attr-defined]
    view = (local.storage_offset(), local.dtype, local.shape, local.stride())
    return (local.untyped_storage()._cdata, *view, local.is_conj(), local.is_neg(), layout)
