"""A nested state, flattened: named tensors, and a tree of everything else.

    {"model": {"w": tensor, "tied": tensor}, "step": 7}

becomes

    tensors: {"model.w": tensor}
    tree:    {"model": {"w": {"$tensor": "model.w"}, "tied": {"$tensor": "model.w"}}, "step": 7}

A name joins the keys of the path with dots. Tied tensors (the same memory with the same dtype,
shape and strides) are kept once, and all their entries refer to one name.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from shardckpt.errors import StateError, UnsupportedLeafError
from shardckpt.format import typed_json as values
from shardckpt.format.dtypes import SAVED, dtype_name
from shardckpt.io.tensor_memory import plain_address
from shardckpt.state.file_groups import OPTIMIZER, frozen_entries, frozen_group
from shardckpt.state.local_chunks import (
    AnyTensor,
    Shards,
    check_dense,
    local_tensor,
    plain_data,
)
from shardckpt.state.markers import FromRank0, PerRank, Union
from shardckpt.state.module_state import (
    ModuleState,
    ddp_rank0_buffers,
    has_state,
    module_state,
    modules_in,
)
from shardckpt.state.optimizer_state import OptimizerState, ParameterNames, optimizer_state
from shardckpt.state.refusals import all_refused, reading_state
from shardckpt.state.sharded_array import ShardedArray, fits_tensor, from_numpy
from shardckpt.state.wrapper_tensors import Wrapped, saveable_form
from shardckpt.torch_compat import dtensor_local, is_dtensor, storage_id

__all__ = ["FlatState", "PerRank", "Ties", "flatten", "placeholder", "too_deep"]

_DEPTH_LIMIT = 100


@dataclass(slots=True, kw_only=True)
class FlatState:
    """A flattened state, returned by flatten.

    Attributes:
        tensors: The tensors that every rank has, by name. A rank may hold no shard of a tensor.
        rank_only: The tensors of this rank only, by name, from inside PerRank or FromRank0.
        saved_elsewhere: The names in `tensors` for which the values of another rank are saved.
        empty_ties: The names that seem tied to one in `tensors`, but of whose elements this rank
            holds none: views of one buffer may begin at the same place if they are empty.
        file_groups: The file groups of the tensors that are not in MAIN, by name.
        tree: The typed JSON of the state, the same on every rank. A placeholder stands for each
            FromRank0.
        per_rank_trees: The typed JSON of the PerRank values.
        rank0_trees: On rank 0, the typed JSON of each FromRank0 value, by name.
        unions: The names of the dicts in a Union marker.
    """

    tensors: dict[str, AnyTensor] = field(default_factory=dict)
    rank_only: dict[str, AnyTensor] = field(default_factory=dict)
    saved_elsewhere: set[str] = field(default_factory=set)
    empty_ties: dict[str, AnyTensor] = field(default_factory=dict)
    file_groups: dict[str, int] = field(default_factory=dict)
    tree: Any = None
    per_rank_trees: list[Any] = field(default_factory=list)
    rank0_trees: dict[str, Any] = field(default_factory=dict)
    unions: list[str] = field(default_factory=list)


def flatten(state: Any, *, rank: int) -> FlatState:
    """Flatten a nested state. Not collective; changes nothing.

    For modules, optimizers and objects with state_dict, the result of their state_dict is
    flattened.

    Raises:
        UnsupportedLeafError: A leaf can't be saved. The error names it.
        StateError: Two entries have the same name.
    """
    flattener = _Flattener(state, rank=rank)
    try:
        with torch.no_grad():  # to_local() then costs nothing
            flattener.flat.tree = flattener.walk(state, "", 0)
    except RecursionError as error:  # from sets in sets; the depth of other containers is counted
        raise too_deep(error.name if isinstance(error, _TooDeepError) else "") from error
    if flattener.refused:
        raise all_refused(flattener.refused)
    return flattener.flat


class _Flattener:
    def __init__(self, state: Any, *, rank: int) -> None:
        self.flat = FlatState()
        self.rank = rank
        self.state = state
        self.inside: type | None = None  # the marker around the current value
        self.ties, self.rank_only_ties = Ties(), Ties()
        self.names: set[str] = set()
        self.refused: list[StateError] = []  # one error names all of them
        self.frozen_modules = 0
        self.parameter_names = ParameterNames(modules_in(state))

    def walk(self, value: Any, name: str, depth: int) -> Any:
        """Return the typed JSON of the value at `name`. Tensors become references."""
        try:
            return self.container(value, name, depth)
        except UnsupportedLeafError as error:
            self.refused.append(error)
            return None

    def container(self, value: Any, name: str, depth: int) -> Any:
        """Return the typed JSON of a value. Raises UnsupportedLeafError if it can't be saved."""
        if isinstance(value, (torch.Tensor, Shards, Wrapped)):
            return self.tensor(value, name, depth)
        if isinstance(value, Mapping) and not isinstance(value, (Counter, values.Record)):
            return values.mapping(self.items(value.items(), name, depth), at=name)
        if isinstance(value, (list, tuple, deque)) and not isinstance(value, torch.Size):
            nodes = [node for _, node in self.items(enumerate(value), name, depth)]
            if isinstance(value, deque):
                return {"$deque": [value.maxlen, nodes]}
            return nodes if isinstance(value, list) else {"$tuple": nodes}
        if isinstance(value, np.ndarray) and fits_tensor(value.dtype):
            return values.reference("numpy", self.add(from_numpy(value, name=name), name))
        if isinstance(value, ShardedArray):
            return values.reference(value.array_type, self.add(self.sharded(value, name), name))
        if isinstance(value, torch.Generator):
            return values.reference("tensor", self.add(value.get_state(), name))
        if isinstance(value, nn.Module):
            entries = module_state(value, at=name)
            value = ModuleState(entries, frozen_entries(value), ddp_rank0_buffers(value))
        if isinstance(value, ModuleState):
            return self.module(value, name, depth)
        if isinstance(value, Optimizer):
            value = OptimizerState(optimizer_state(value, self.parameter_names, at=name))
        if isinstance(value, OptimizerState):
            before = len(self.flat.tensors)
            node = self.walk(value.entries, name, depth)
            added = itertools.islice(self.flat.tensors, before, None)
            self.flat.file_groups.update(dict.fromkeys(added, OPTIMIZER))
            return node
        if isinstance(value, PerRank):
            return self.per_rank(value, name, depth)
        if isinstance(value, FromRank0):
            return self.from_rank0(value, name, depth)
        if isinstance(value, Union):
            return self.union(value, name, depth)
        if has_state(value):
            with reading_state(value, at=name):
                state = value.state_dict()
            self.parameter_names.add(modules_in(state, at=name))
            return self.walk(state, name, depth)
        record = values.record_of(value)
        if record is not None:
            fields = self.items(record.items(), name, depth)
            return {"$record": [record.type_name, values.mapping(fields, at=name)]}
        self.take(name)
        return values.encode(value, at=name)

    def items(self, items: Iterable[tuple[Any, Any]], name: str, depth: int) -> Any:
        """List (key, typed JSON) of the items of the container at `name`."""
        self.take(name)
        if depth > _DEPTH_LIMIT:
            raise _TooDeepError(name)
        nodes = []
        for key, item in items:
            inner = f"{name}.{key}" if name else str(key)
            if not inner:
                raise StateError(
                    "An entry of the state has no name",
                    expected="keys that are not empty",
                    actual="an empty key",
                    remedy="rename the key",
                )
            data = plain_data(item)
            node = None if data is None else self.plain(item, data, inner)
            nodes.append((key, node or self.walk(item, inner, depth + 1)))
        return nodes

    def plain(self, tensor: torch.Tensor, data: torch.Tensor, name: str) -> Any:
        """Add a tensor of the most common form: its `data` on this rank have their own memory, and
        its ASCII name is new.

        Returns:
            Its reference. None for any other tensor, which is not added.
        """
        if (
            self.inside is not None
            or name in self.names
            or not name.isascii()
            or data.dtype not in SAVED
            or not (address := plain_address(data))
        ):
            return None
        self.names.add(name)
        first = self.ties.first_at(address, tensor, name)
        if first == name:
            self.flat.tensors[name] = tensor
        return {"$tensor": first}

    def tensor(self, tensor: Any, name: str, depth: int) -> Any:
        try:
            tensor = saveable_form(tensor, name=name)
        except StateError as error:
            self.refused.append(error)
            return None
        if isinstance(tensor, Wrapped):
            return self.walk(tensor.entries, name, depth)
        return values.reference("tensor", self.add(tensor, name))

    def module(self, module: ModuleState, name: str, depth: int) -> Any:
        before = len(self.flat.tensors)
        node = self.walk(module.entries, name, depth)
        below = f"{name}." if name else ""
        frozen = {f"{below}{own}" for own in module.frozen}
        self.flat.saved_elsewhere.update(f"{below}{own}" for own in module.saved_elsewhere)
        added = [
            n
            for n in itertools.islice(self.flat.tensors, before, None)
            if n in frozen or n.rpartition(".")[0] in frozen  # an inner tensor of a wrapper
        ]
        if added:
            self.flat.file_groups.update(dict.fromkeys(added, frozen_group(self.frozen_modules)))
            self.frozen_modules += 1
        return node

    def take(self, name: str) -> None:
        """Register the name of an entry, which must be unique, as loads find entries by name."""
        if self.inside is PerRank:
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

    def add(self, tensor: AnyTensor, name: str) -> str:
        """Add a tensor. Returns the name under which it is saved, which differs if it is tied."""
        if not name:
            raise StateError(
                "A tensor must be in a dict, which gives it a name",
                remedy='put it into a dict: {"name": tensor}',
            )
        self.take(name)
        if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
            raise StateError(
                "The name of a tensor is not valid Unicode",
                tensor=ascii(name),
                expected="text without lone surrogates",
                remedy="rename the key",
            )
        _check_leaf(tensor, name)
        ties, tensors = self.ties, self.flat.tensors
        if self.inside is not None:
            ties, tensors = self.rank_only_ties, self.flat.rank_only
        if self.inside is PerRank:
            name = f"{name}@rank{self.rank}"
        first = ties.first(tensor, name)
        if first == name:
            tensors[name] = tensor
        elif self.inside is None and is_dtensor(tensor) and not dtensor_local(tensor).numel():
            self.flat.empty_ties[name] = tensor
        return first

    def sharded(self, value: ShardedArray, name: str) -> ShardedArray:
        if self.inside is not None:
            raise StateError(
                f"A ShardedArray can't be inside {self.inside.__name__}",
                tensor=name,
                remedy="move it out of the marker, which it does not need",
            )
        return value.check(name)

    def per_rank(self, value: PerRank, name: str, depth: int) -> Any:
        self.flat.per_rank_trees.append(self.marked(value, name, depth))
        return values.reference("per_rank", str(len(self.flat.per_rank_trees) - 1))

    def from_rank0(self, value: FromRank0, name: str, depth: int) -> Any:
        if self.rank == 0:
            self.flat.rank0_trees[name] = self.marked(value, name, depth)
        else:
            self.take(name)
        return placeholder(name)

    def marked(self, value: PerRank | FromRank0, name: str, depth: int) -> Any:
        """Return the typed JSON of the value in a marker."""
        if self.inside is not None:
            raise StateError(
                f"{type(value).__name__} can't be inside {self.inside.__name__}",
                tensor=name,
                remedy="use one marker",
            )
        self.inside = type(value)
        try:
            return self.walk(value.value, name, depth)
        finally:
            self.inside = None

    def union(self, value: Union, name: str, depth: int) -> Any:
        node = self.walk(value.value, name, depth)
        if node is not None and not (type(node) is dict and values.tag_of(node) in (None, "$dict")):
            raise StateError(
                "Union marks a dict",
                tensor=name,
                expected="a dict, or an object whose state_dict() returns one",
                actual=type(value.value).__name__,
                remedy="remove the marker, or use PerRank for a value that differs by rank",
            )
        self.flat.unions.append(name)
        return node


class _TooDeepError(RecursionError):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = f"{name[:80]}..."


def _check_leaf(tensor: AnyTensor, name: str) -> None:
    """Raise UnsupportedLeafError for a tensor that can't be saved."""
    check_dense(tensor, name=name)
    dtype_name(tensor.dtype, tensor=name)
    if tensor.is_meta:
        raise UnsupportedLeafError(
            "A tensor on the meta device holds no data",
            tensor=name,
            expected="a tensor with data",
            actual="device meta",
            remedy="materialize it first: to_empty(), or load a checkpoint into it",
        )


def too_deep(name: str) -> UnsupportedLeafError:
    """Return the error of a state whose containers are nested too deeply."""
    return UnsupportedLeafError(
        "The state is nested too deeply, or contains itself",
        tensor=name,
        expected=f"at most {_DEPTH_LIMIT} levels",
        remedy="flatten it, or break the cycle",
    )


def placeholder(name: str) -> dict[str, str]:
    """Return the placeholder that every rank saves for a FromRank0.

    Rank 0 replaces it by its value, see plan/local_plan.
    """
    return {"$from_rank0": ascii(name)[1:-1]}


class Ties:
    """Finds tied tensors: the same memory with the same dtype, shape and strides."""

    def __init__(self) -> None:
        # Most tensors have a unique address. Only for others are all the facts compared.
        self._at: dict[int, tuple[torch.Tensor, str]] = {}
        self._same: dict[tuple[Any, ...], str] = {}

    def first(self, tensor: AnyTensor, name: str) -> str:
        """Return the name under which this memory was first seen: `name`, if it is new."""
        if isinstance(tensor, (ShardedArray, Shards)):  # a rank may hold any shards, or none
            return self._same.setdefault(_described_key(tensor), name)
        local = local_tensor(tensor)
        if local is not None and (address := local.data_ptr()):  # 0: it has no elements
            return self.first_at(address, tensor, name)
        return self._same.setdefault(_memory_key(tensor), name)

    def first_at(self, address: int, tensor: torch.Tensor, name: str) -> str:
        """Return what `first` returns, for a tensor whose memory begins at `address`."""
        other, known = self._at.setdefault(address, (tensor, name))
        if other is tensor:
            return known
        self._same.setdefault(_memory_key(other), known)
        return self._same.setdefault(_memory_key(tensor), name)


def _described_key(tensor: ShardedArray | Shards) -> tuple[Any, ...]:
    """Return the key of _memory_key for a tensor that describes its shards."""
    source: Any = tensor.source if isinstance(tensor, Shards) else tensor
    if not hasattr(source, "global_shape"):
        return (id(source),)
    boxes = tuple((chunk.offsets, chunk.sizes) for chunk in tensor.chunks)  # type: ignore[union-attr]
    return (*_memory_key(source), tensor.shape, boxes)


def _memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tied tensors.

    The key uses the identity of the storage, which also empty local shards have.
    """
    local = local_tensor(tensor)
    if local is None:
        return (id(tensor),)
    layout: tuple[Any, ...] = ()
    if local is not tensor:
        layout = (tensor.shape, tensor.placements, tensor.device_mesh)  # type: ignore[attr-defined]
    view = (local.storage_offset(), local.dtype, local.shape, local.stride())
    return (storage_id(local), *view, local.is_conj(), local.is_neg(), layout)
