"""What a load fills with what: the caller's state against the saved one.

`Matcher.match` walks the caller's state, notes the reads that fill its tensors and every
disagreement, and returns a function that puts the rest in place once the tensors have
been read.
"""

from __future__ import annotations

import copy
import itertools
import types
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardckpt.errors import LoadMismatchError, StateError
from shardckpt.format.dtypes import DTYPES, OPAQUE
from shardckpt.format.entries import TensorEntry
from shardckpt.format.typed_json import TensorRef, record_of
from shardckpt.io.tensor_memory import owns_memory
from shardckpt.state.flatten import Ties
from shardckpt.state.local_chunks import (
    PLAIN,
    AnyTensor,
    LocalChunk,
    check_dense,
    lies_as_saved,
    local_chunks,
)
from shardckpt.state.markers import FromRank0, PerRank, Union
from shardckpt.state.materialize import NOTHING, Allocate, Builder, allocate
from shardckpt.state.module_matching import match_module
from shardckpt.state.module_state import has_state, modules_in
from shardckpt.state.optimizer_matching import match_optimizer
from shardckpt.state.optimizer_state import ParameterNames
from shardckpt.state.saved_tree import SavedState, below, under
from shardckpt.state.sharded_array import ShardedArray, fits_tensor, from_numpy
from shardckpt.state.sharded_tensors import materialised
from shardckpt.state.wrapper_tensors import Wrapped, match_wrapped, read_out

__all__ = ["Finish", "Matcher", "Mismatches", "check_untaken"]

Finish = Callable[[], Any]
"""Puts a matched value in place, after the reads, and returns it."""


@dataclass(slots=True)
class Mismatches:
    """Where what was asked for and what was saved disagree."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[tuple[str, Any, Any]] = field(default_factory=list)
    wrong_dtype: list[tuple[str, Any, Any]] = field(default_factory=list)

    @property
    def only_unexpected(self) -> bool:
        """Whether nothing is wrong but that something was left."""
        return not (self.missing or self.wrong_shape or self.wrong_dtype)

    def error(self, path: str) -> LoadMismatchError | None:
        """One error that lists every entry, or None where there is nothing to say."""
        lines = [f"missing in the checkpoint: {name}" for name in self.missing]
        lines += [f"saved, but nothing takes it: {name}" for name in self.unexpected]
        for kind, entries in (("shape", self.wrong_shape), ("dtype", self.wrong_dtype)):
            lines += [f"{kind} of {name}: expected {a}, found {b}" for name, a, b in entries]
        if not lines:
            return None
        return LoadMismatchError(
            "\n    ".join(["The checkpoint does not hold what was asked for", *lines]),
            path=path,
            tensor=lines[0].split(": ")[1] if len(lines) == 1 else None,
            missing=tuple(self.missing) or None,
            unexpected=tuple(self.unexpected) or None,
            wrong_shape=tuple(self.wrong_shape) or None,
            wrong_dtype=tuple(self.wrong_dtype) or None,
            remedy="strict=False loads what agrees; dtype='cast' converts; rename= and keys= map "
            "and choose names",
        )


def _left(names: list[str], path: str) -> LoadMismatchError:
    error = Mismatches(unexpected=names).error(path)
    assert error is not None
    return error


def check_untaken(untaken: Sequence[Sequence[str]], path: str) -> None:
    """Raise LoadMismatchError for what modules and optimizers should have taken; from what each
    rank's left, in rank order.

    Ranks of different pipeline stages leave what others take. What no rank takes is an error, and
    so is a rank that takes a part of what another one does and nothing else.
    """
    names = [frozenset(own) for own in untaken]
    nobody = frozenset.intersection(*names)
    if nobody:
        left = [name for name in untaken[0] if name in nobody]
        raise _left(left, path)
    sets = {own: rank for rank, own in reversed(list(enumerate(names)))}
    for (mine, a), (theirs, b) in itertools.permutations(sets.items(), 2):
        if mine > theirs:
            error = _left(sorted(mine - theirs), path)
            error.rank, error.facts["taken_by_rank"] = a, b
            raise error


class Matcher:
    """Matches a caller's state against a saved one, for one rank."""

    def __init__(
        self, state: Any, saved: SavedState, *, rank: int, world_size: int, cast: bool
    ) -> None:
        self.state = state
        self.saved = saved
        self.rank = rank
        self.world_size = world_size
        self.may_cast = cast
        self.reads: list[tuple[TensorEntry, LocalChunk]] = []
        self.mismatches = Mismatches()
        self.cast: list[tuple[str, str, str]] = []
        self.kept: list[str] = []
        self.used: set[str] = set()
        self.filled: list[torch.Tensor] = []  # those whose memory is that of other tensors
        self.owned: list[str] = []  # names of modules and optimizers, which take all below them
        self._filled = Ties()
        self.parameter_names = ParameterNames(modules_in(state))

    def match(self, template: Any, name: str = "") -> Finish:
        """Match one value of the caller's state; see the module's docstring."""
        per_rank = _is_per_rank(self.saved.nodes.get(name))
        if isinstance(template, torch.Tensor) and not per_rank:
            tensor = self.tensor(template, name)
            return lambda: tensor
        if per_rank and not isinstance(template, PerRank):
            marked = self.per_rank(PerRank(template), name)
            return lambda: marked().value
        if isinstance(template, nn.Module):
            return match_module(self, template, name)
        if isinstance(template, Optimizer):
            return match_optimizer(self, template, name)
        if isinstance(template, PerRank):
            return self.per_rank(template, name)
        if isinstance(template, (FromRank0, Union)):
            return self.marked(template, name)
        if isinstance(template, np.ndarray):
            return self.array(template, name)
        if isinstance(template, ShardedArray):
            return self.sharded(template, name)
        if isinstance(template, Mapping) and template and not isinstance(template, Counter):
            return self.mapping(template, name)
        if isinstance(template, (list, tuple)) and any(map(_takes_tensors, template)):
            return self.sequence(template, name)
        if has_state(template):
            return self.stateful(template, name)
        if isinstance(template, torch.Generator):
            return self.generator(template, name)
        if record_of(template):
            return self.record(template, name)
        return self.value(template, name)

    def mark_changed(self) -> None:
        """Tell autograd, after the reads, what was written to, as after any change in place."""
        tensors = [*self.filled, *(chunk.data for _, chunk in self.reads)]
        with torch._C.DisableTorchFunctionSubclass():  # private in torch 2.13
            increment_version([tensor for tensor in tensors if not tensor.is_inference()])

    def settle(self) -> None:
        """Once all is matched: what was saved and nothing took."""
        self.mismatches.unexpected += [n for n in self.saved.leaves if n not in self.used]

    def strict_part(self) -> Mismatches:
        """The mismatches that a strict load refuses: of what was saved and not taken, only that
        which lies below a module or optimizer."""
        owned = [
            name
            for name in self.mismatches.unexpected
            if any(under(name, owner) for owner in self.owned)
        ]
        found = self.mismatches
        return Mismatches(found.missing, owned, found.wrong_shape, found.wrong_dtype)

    def find(self, name: str) -> tuple[str, TensorEntry] | None:
        """The saved tensor for a name, and its name in the manifest, noted as used; None, noted as
        missing, if there is none."""
        node = self.saved.nodes.get(name, NOTHING)
        if node is NOTHING:
            self.mismatches.missing.append(name)
            return None
        self.used.add(name)
        if isinstance(node, TensorRef):
            return node.name, self.saved.manifest.tensors[node.name]
        self.mismatches.wrong_dtype.append((name, "a tensor", type(node).__name__))
        return None

    def tensor(self, template: Any, name: str) -> Any:
        """Fill a tensor in place (one on the meta device: a new one like it); returns it."""
        target = read_out(template, name=name)
        if isinstance(target, Wrapped):
            return match_wrapped(self, target, name)
        if not self.saved.selected(name) or self.plain(template, name):
            return template
        check_dense(target, name=name)
        found = self.find(name)
        if found is None or not self.agrees(found[1], target, name):
            return template
        if target.is_meta:
            template = materialised(template, name)
            target = read_out(template, name=name)
        self.fill(found, target, name)
        if type(template) is DTensor:
            self.filled.append(template)
        return template

    def plain(self, template: torch.Tensor, name: str) -> bool:
        """As `tensor` for one as most are: in CPU memory as the saved one lies in its file. False
        for any other, of which nothing is noted then."""
        ref = self.saved.nodes.get(name)
        if type(template) not in PLAIN or type(ref) is not TensorRef or ref.kind == "per_rank":
            return False
        entry = self.saved.manifest.tensors[ref.name]
        if (
            not lies_as_saved(template, entry.dtype)
            or (shape := template.shape) != entry.shape
            or hasattr(template, "global_shape")  # of a part
            or not owns_memory(template)
            or not (address := template.data_ptr())
            or self._filled.first_at(address, template, ref.name) != ref.name
        ):
            return False
        self.used.add(name)
        self.reads.append((entry, LocalChunk((0,) * len(shape), shape, template, address)))
        return True

    def agrees(self, entry: TensorEntry, template: AnyTensor, name: str) -> bool:
        """Whether a saved tensor can fill the template; notes the mismatch, or the cast."""
        if template.shape != entry.shape:
            self.mismatches.wrong_shape.append((name, list(template.shape), list(entry.shape)))
            return False
        saved = DTYPES[entry.dtype]
        if template.dtype != saved:
            if not self.may_convert(saved, template.dtype):
                self.mismatches.wrong_dtype.append((name, str(template.dtype), str(saved)))
                return False
            self.cast.append((name, str(saved), str(template.dtype)))
        return True

    def may_convert(self, saved: torch.dtype, wanted: torch.dtype) -> bool:
        """Whether dtype="cast" converts a saved dtype to a wanted one."""
        opaque = saved in OPAQUE or wanted in OPAQUE
        return self.may_cast and not opaque and (wanted.is_complex or not saved.is_complex)

    def fits(self, entry: TensorEntry, template: AnyTensor) -> bool:
        """Whether a saved tensor can fill the template; notes nothing."""
        saved, wanted = DTYPES[entry.dtype], template.dtype
        return template.shape == entry.shape and (
            wanted == saved or self.may_convert(saved, wanted)
        )

    def fill(self, found: tuple[str, TensorEntry], tensor: AnyTensor, name: str) -> None:
        """Note the reads that fill a tensor, once for tied ones."""
        source, entry = found
        first = self._filled.first(tensor, source)
        if first != source:
            raise StateError(
                "Two saved tensors would be loaded into the same memory",
                tensor=name,
                expected=f"tied entries in the checkpoint, as in the state: {first}",
                actual=f"{source}, saved apart",
                remedy="leave one of them out with keys=, or untie the tensors first",
            )
        for chunk in local_chunks(tensor, name=name):
            data = chunk.data
            if not data.is_contiguous() and any(
                step == 0 and size > 1 for step, size in zip(data.stride(), data.shape, strict=True)
            ):
                raise StateError(
                    "A tensor whose elements share memory can't be filled",
                    tensor=name,
                    expected="memory of its own for each element",
                    actual=f"strides {data.stride()}",
                    remedy="clone() it first: it was made by expand() or broadcasting",
                )
            self.reads.append((entry, chunk))

    def array(self, template: np.ndarray[Any, Any], name: str) -> Finish:
        """Fill an array in place, of whatever byte order and strides; replace one that is read-only
        or of a dtype that no tensor has."""
        if not template.flags.writeable or not fits_tensor(template.dtype):
            return self.value(template, name)
        tensor = from_numpy(template, name=name)
        self.tensor(tensor, name)

        def finish() -> Any:
            read = tensor.numpy()
            if not np.may_share_memory(template, read):
                template[...] = read
            return template

        return finish

    def sharded(self, template: ShardedArray, name: str) -> Finish:
        """Fill this rank's part of an array in place."""
        found = self.find(name) if self.saved.selected(name) else None
        if found is None or not self.agrees(found[1], template.check(name), name):
            return lambda: template
        template.check_writeable(name)
        self.fill(found, template, name)

        def finish() -> Any:
            template.loaded()
            return template

        return finish

    def marked(self, template: FromRank0 | Union, name: str) -> Finish:
        """Match what is in a marker. Without tensors, rank 0's value is taken as it was saved."""
        mark, value = type(template), template.value
        if mark is FromRank0 and not _takes_tensors(value):
            found = self.build(name)
            return lambda: template if found is NOTHING else mark(found)
        inner = self.match(value, name)
        return lambda: mark(inner())

    def generator(self, template: torch.Generator, name: str) -> Finish:
        """Set a random-number generator to the state that was saved."""
        state, before = template.get_state(), len(self.reads)
        self.tensor(state, name)
        if len(self.reads) == before:
            return lambda: template

        def finish() -> Any:
            template.set_state(state)
            return template

        return finish

    def record(self, template: Any, name: str) -> Finish:
        """Match each field of a dataclass or the like. A frozen one is replaced by a copy, as its
        class makes it: nothing is called but copy.copy."""
        fields = self.mapping(dict(record_of(template) or {}), name)

        def finish() -> Any:
            target, values = template, fields()
            changed = {k: v for k, v in values.items() if v is not getattr(template, k, values)}
            try:
                for key, value in changed.items():
                    setattr(target, key, value)
            except AttributeError:  # frozen
                target = copy.copy(template)
                for key, value in changed.items():
                    object.__setattr__(target, key, value)
            return target

        return finish

    def mapping(self, template: Any, name: str) -> Finish:
        """Match each item of a dict; what is saved beside them stays unused."""
        if not isinstance(template, (MutableMapping, types.MappingProxyType)):
            raise StateError(
                "A mapping that can't be changed can't be loaded into",
                tensor=name,
                expected="a dict, another mutable mapping, or a MappingProxyType",
                actual=f"{type(template).__module__}.{type(template).__qualname__}",
                remedy="hand over dict(...) of it",
            )
        parts: dict[Any, Finish] = {}
        for key, value in template.items():
            inner = below(name, key)
            if type(value) in PLAIN and self.saved.selected(inner) and self.plain(value, inner):
                continue  # as most are: there is nothing left to do once it is read
            parts[key] = self.match(value, inner)

        def finish() -> Any:
            values = {key: part() for key, part in parts.items()}
            changed = {key: item for key, item in values.items() if item is not template[key]}
            if changed and isinstance(template, types.MappingProxyType):
                return types.MappingProxyType({**template, **changed})
            for key, item in changed.items():
                template[key] = item
            return template

        return finish

    def sequence(self, template: Any, name: str) -> Finish:
        """Match each item of a list or tuple that holds tensors."""
        parts = [self.match(value, below(name, index)) for index, value in enumerate(template)]

        def finish() -> Any:
            values = [part() for part in parts]
            if isinstance(template, list):
                template[:] = values
                return template
            return template._make(values) if hasattr(template, "_fields") else tuple(values)

        return finish

    def value(self, template: Any, name: str) -> Finish:
        """Replace a value by what was saved; an empty dict or list takes all below its name."""
        value = self.build(name)
        if value is NOTHING:
            return lambda: template
        named = getattr(template, "_fields", None) if isinstance(template, tuple) else None
        if named is not None and isinstance(value, tuple) and len(value) != len(named):
            self.mismatches.wrong_shape.append((name, list(named), f"{len(value)} items"))
            return lambda: template

        def finish() -> Any:
            if isinstance(template, dict) and type(value) is dict:  # a Counter would add
                template.update(value)
                return template
            if isinstance(template, list) and isinstance(value, list):
                template[:] = value
                return template
            if named is not None and isinstance(value, tuple):
                return template._make(value)
            return value

        return finish

    def stateful(self, template: Any, name: str) -> Finish:
        """An object that restores itself: its tensors are filled where they have their match, and
        load_state_dict gets what was saved."""
        value = self.build(name, like=template.state_dict())
        if value is NOTHING:
            return lambda: template

        def finish() -> Any:
            template.load_state_dict(value)
            return template

        return finish

    def build(self, name: str, like: Any = None, new: Allocate = allocate) -> Any:
        """What was saved at a name, anew; NOTHING, noted as missing, where nothing was. Tensors in
        `like`, a nested value, are filled where they agree; `new` makes the others."""
        if name not in self.saved.nodes:
            if self.saved.selected(name):
                self.mismatches.missing.append(name)
            return NOTHING
        tensors = dict(_tensors(like, name))
        builder = Builder(self.saved, self.reads, like=tensors, filled=self._filled, new=new)
        value = builder.build(self.saved.nodes[name], name)
        self.used.update(builder.built)
        return value

    def per_rank(self, template: PerRank, name: str) -> Finish:
        """Match this rank's own value, or what on_resize says if the number of ranks differs."""
        node = self.saved.nodes.get(name)
        if not _is_per_rank(node):
            inner = self.match(template.value, name)
            return lambda: PerRank(inner(), template.on_resize)
        if not self.saved.selected(name):
            return lambda: template
        self.used.add(name)
        saved_world = self.saved.manifest.world_size
        rank = self.rank
        if saved_world != self.world_size:
            if callable(policy := template.on_resize):
                every = Builder(self.saved, self.reads).build(node, name)
                return lambda: PerRank(policy(every), policy)
            if policy == "error":
                raise StateError(
                    "A PerRank entry does not fit another number of ranks",
                    tensor=name,
                    expected=f"{saved_world} ranks, as saved",
                    actual=f"{self.world_size} ranks",
                    remedy='load with as many ranks, or mark it with another on_resize="keep"',
                )
            if policy == "keep":
                self.kept.append(name)
                return lambda: template
            rank %= saved_world
        outer = self.saved
        self.saved = outer.with_node(outer.per_rank(node, rank=rank), name)
        try:
            inner = self.match(template.value, name)
        finally:
            self.saved = outer
        return lambda: PerRank(inner(), template.on_resize)


def _is_per_rank(node: Any) -> TypeGuard[TensorRef]:
    return isinstance(node, TensorRef) and node.kind == "per_rank"


_VALUES = {type(None), bool, int, float, str, bytes}


def _takes_tensors(value: Any) -> bool:
    if isinstance(value, (Mapping, list, tuple)):
        items = value.values() if isinstance(value, Mapping) else value
        return any(map(_takes_tensors, items))
    if isinstance(value, (torch.Tensor, np.ndarray, ShardedArray, torch.Generator)):
        return True
    if isinstance(value, (PerRank, FromRank0, Union)):
        return True
    return type(value) not in _VALUES and (has_state(value) or bool(record_of(value)))


def _tensors(value: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of the tensors in a nested value."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return [found for key, item in items for found in _tensors(item, below(name, key))]
