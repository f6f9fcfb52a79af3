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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from shardckpt.errors import StateError, UnsupportedLeafError
from shardckpt.format import values
from shardckpt.format.dtypes import dtype_name
from shardckpt.format.values import TensorRef
from shardckpt.planning.chunks import is_distributed
from shardckpt.planning.kinds import OPTIMIZER, frozen_entries, kind_of
from shardckpt.planning.stateful import (
    has_state,
    module_state,
    modules_in,
    optimizer_state,
    parameter_names,
)

__all__ = ["FlatState", "PerRank", "flatten", "join"]

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
    name -> tensor of this rank alone, from inside PerRank. `kinds`: name -> kind of the
    tensors whose kind (see planning/kinds) is not MAIN. `tree`: the typed JSON of the
    state, equal on every rank. `own_trees`: the typed JSON of the PerRank values.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    tree: Any = None
    own_trees: list[Any] = field(default_factory=list)


def join(path: tuple[Any, ...]) -> str:
    """The name of the entry at a path of keys."""
    return ".".join(map(str, path))


def flatten(state: Any, *, rank: int) -> FlatState:
    """Flatten a nested state; modules, optimizers and objects with state_dict are asked for theirs.

    Not collective, changes nothing. Raises UnsupportedLeafError naming the path of a leaf
    that can't be saved, StateError where two paths have the same name.
    """
    flattener = _Flattener(state, rank=rank)
    skeleton = flattener.walk(state, ())
    flattener.flat.tree = values.encode(skeleton, at="")
    return flattener.flat


class _Flattener:
    def __init__(self, state: Any, *, rank: int) -> None:
        self.flat = FlatState()
        self.rank = rank
        self.state = state
        self.inside_per_rank = False
        self.memory: dict[tuple[Any, ...], str] = {}
        self.paths: dict[str, tuple[Any, ...]] = {}
        self.frozen_modules = 0
        self._parameter_names: dict[int, str] | None = None

    def walk(self, value: Any, path: tuple[Any, ...]) -> Any:
        """The skeleton of `value`: its containers, with references where tensors were."""
        if isinstance(value, torch.Tensor):
            return TensorRef(self.add(value, path), "tensor")
        if isinstance(value, Mapping):
            self.check_depth(path)
            return {key: self.walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            self.check_depth(path)
            items = [self.walk(item, (*path, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if value is None or isinstance(value, (str, int, float)):
            return value
        if isinstance(value, np.ndarray):
            return TensorRef(self.add(_from_numpy(value, path), path), "numpy")
        if isinstance(value, nn.Module):
            return self.module(value, path)
        if isinstance(value, Optimizer):
            before = len(self.flat.tensors)
            packed = optimizer_state(value, self.parameter_names(), at=join(path))
            skeleton = self.walk(packed, path)
            added = itertools.islice(self.flat.tensors, before, None)
            self.flat.kinds.update(dict.fromkeys(added, OPTIMIZER))
            return skeleton
        if isinstance(value, PerRank):
            return self.per_rank(value, path)
        if has_state(value):
            return self.walk(value.state_dict(), path)
        return value

    def module(self, module: nn.Module, path: tuple[Any, ...]) -> Any:
        before = len(self.flat.tensors)
        skeleton = self.walk(module_state(module), path)
        frozen = {join((*path, name)) for name in frozen_entries(module)}
        added = [n for n in itertools.islice(self.flat.tensors, before, None) if n in frozen]
        if added:
            self.flat.kinds.update(dict.fromkeys(added, kind_of(self.frozen_modules)))
            self.frozen_modules += 1
        return skeleton

    def add(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> str:
        name = join(path) + (f"@rank{self.rank}" if self.inside_per_rank else "")
        if not path:
            raise StateError(
                "A tensor by itself has no name", remedy='put it into a dict: {"name": tensor}'
            )
        dtype_name(tensor.dtype, tensor=name)
        if tensor.is_meta:
            raise UnsupportedLeafError(
                "A tensor on the meta device holds no data",
                tensor=name,
                expected="a tensor with data",
                actual="device meta",
                remedy="materialise it first: to_empty(), or load a checkpoint into it",
            )
        if self.paths.setdefault(name, path) != path:
            raise StateError(
                "Two entries of the state have the same name",
                tensor=name,
                expected="different names",
                actual=f"{self.paths[name]!r} and {path!r}",
                remedy="rename a key",
            )
        key = (self.inside_per_rank, *memory_key(tensor))
        first = self.memory.setdefault(key, name)
        if first == name:
            (self.flat.own if self.inside_per_rank else self.flat.tensors)[name] = tensor
        return first

    def per_rank(self, value: PerRank, path: tuple[Any, ...]) -> TensorRef:
        if self.inside_per_rank:
            raise StateError("PerRank inside PerRank", tensor=join(path), remedy="mark it once")
        self.inside_per_rank = True
        skeleton = self.walk(value.value, path)
        self.inside_per_rank = False
        self.flat.own_trees.append(values.encode(skeleton, at=join(path)))
        return TensorRef(str(len(self.flat.own_trees) - 1), "per_rank")

    def parameter_names(self) -> dict[int, str]:
        if self._parameter_names is None:
            self._parameter_names = parameter_names(modules_in(self.state))
        return self._parameter_names

    def check_depth(self, path: tuple[Any, ...]) -> None:
        if len(path) > _DEPTH_LIMIT:
            raise UnsupportedLeafError(
                "The state is nested too deeply, or contains itself",
                tensor=join(path[:8]) + "...",
                expected=f"at most {_DEPTH_LIMIT} levels",
                remedy="flatten it, or break the cycle",
            )


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same memory seen in the same way.

    The storage is known by its address as an object, which even empty local shards have.
    """
    with torch.no_grad():
        local = tensor
        layout: tuple[Any, ...] = ()
        if is_distributed(tensor):
            if not hasattr(tensor, "to_local"):
                return (id(tensor),)
            local = tensor.to_local()
            layout = (tensor.shape, tensor.placements, tensor.device_mesh)  # type: ignore[attr-defined]
        if local.layout is not torch.strided or hasattr(local, "__tensor_flatten__"):
            return (id(tensor),)
        storage = local.untyped_storage()._cdata
    return (storage, local.storage_offset(), local.dtype, local.shape, local.stride(), layout)


def _from_numpy(array: np.ndarray[Any, Any], path: tuple[Any, ...]) -> torch.Tensor:
    """A tensor over the array's memory where torch allows it, else over a copy."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in native.strides) or not native.flags.writeable:
        native = native.copy()
    try:
        return torch.from_numpy(native)
    except TypeError as error:
        raise UnsupportedLeafError(
            "A numpy array of this dtype can't be saved",
            tensor=join(path),
            expected="a numeric or bool dtype of up to 64 bits (complex64 for complex numbers)",
            actual=str(array.dtype),
            remedy="convert it with astype(), or save it as a list",
        ) from error
