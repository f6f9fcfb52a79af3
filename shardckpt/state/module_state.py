"""Modules as plain dicts with canonical names.

A canonical name is the name in the module as its author wrote it, without the prefixes `module.` of
DDP, `_orig_mod.` of torch.compile, and that of activation checkpointing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from shardckpt.errors import StateError, UnsupportedLeafError
from shardckpt.format.typed_json import record_of
from shardckpt.state.markers import FromRank0, PerRank, Union
from shardckpt.state.refusals import reading_state
from shardckpt.state.saved_tree import below
from shardckpt.state.sharded_tensors import carry_layout
from shardckpt.torch_compat import child_names, is_parameter

__all__ = [
    "ModuleState",
    "NamedState",
    "aliases",
    "canonical_names",
    "ddp_rank0_buffers",
    "has_state",
    "instances_in",
    "is_wrapped",
    "module_state",
    "modules_in",
    "named_state",
    "names_by_identity",
    "parameter_names",
]

T = TypeVar("T")

_LEAVES = (torch.Tensor, str, int, float, type(None))
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module"}

# Names of modules, cached with the facts that they depend on. The walks take most of a save's time.
_canonical: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, str]]] = WeakKeyDictionary()
_by_identity: WeakKeyDictionary[nn.Module, tuple[Any, Any, dict[int, str]]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class ModuleState:
    """The state of a module.

    Attributes:
        entries: Its entries by canonical name.
        frozen: The names that probably don't change between saves (see file_groups).
        saved_elsewhere: The names for which the values of another rank are saved (see
            ddp_rank0_buffers).
    """

    entries: dict[str, Any]
    frozen: Set[str]
    saved_elsewhere: Set[str]


def has_state(value: Any) -> bool:
    """Whether a value saves and restores itself through state_dict and load_state_dict."""
    return (
        not isinstance(value, (type, Mapping))
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def modules_in(state: Any, *, at: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the outermost modules in a nested state, whose own name is `at`."""
    return instances_in(state, nn.Module, at=at)


def instances_in(state: Any, cls: type[T], *, at: str = "") -> Iterator[tuple[str, T]]:
    """Yield (name, object) of the outermost objects of a class in a nested state, whose own name is
    `at`.
    """
    stack: list[tuple[tuple[str, ...], Any]] = [((at,) if at else (), state)]
    seen: set[int] = set()
    while stack:
        path, value = stack.pop()
        if isinstance(value, (Union, PerRank, FromRank0)):
            value = value.value
        if isinstance(value, cls):
            yield ".".join(path), value
            continue
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (list, tuple, deque)):
            items = enumerate(value)
        elif not has_state(value) and (record := record_of(value)):
            items = record.items()
        if items and id(value) not in seen:
            seen.add(id(value))
            stack.extend(
                ((*path, str(key)), item)
                for key, item in reversed(list(items))
                if isinstance(item, cls) or not isinstance(item, _LEAVES)  # most are leaves
            )


def canonical_names(module: nn.Module) -> dict[str, str]:
    """Return the canonical name of each key of `module.state_dict()`.

    Raises:
        UnsupportedLeafError: The module is an FSDP1 module, whose flat parameters have no names.
    """
    keys = dict.fromkeys(module.state_dict(keep_vars=True))
    keys.update(dict.fromkeys(name for name, _ in module.named_parameters()))
    return _canonical_names(module, keys)


def _canonical_names(module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    depends_on = (list(keys), _classes(module))
    known = _canonical.get(module)
    if known is None or known[0] != depends_on:
        canonical = _canonicalizer(module)
        known = _canonical[module] = depends_on, {key: canonical(key) for key in keys}
    return known[1]


def _classes(module: nn.Module) -> list[type]:
    return [type(part) for part in module.modules()]


def _canonicalizer(module: nn.Module) -> Callable[[str], str]:
    prefixes: dict[str, str] = {}

    def walk(owner: nn.Module, raw: str, canonical: str) -> None:
        prefixes[raw] = canonical
        if type(owner).__name__ == "FullyShardedDataParallel":
            raise UnsupportedLeafError(
                "An FSDP1 module can't be saved or loaded directly",
                tensor=canonical.rstrip(".") or None,
                expected="a plain module, or one under DDP, FSDP2 (fully_shard) or torch.compile",
                actual=type(owner).__qualname__,
                remedy="pass the dicts that torch.distributed.checkpoint.state_dict."
                "get_state_dict() returns, or move to fully_shard",
            )
        for name, child in owner.named_children():
            inner = canonical if is_wrapped(owner, name) else f"{canonical}{name}."
            walk(child, f"{raw}{name}.", inner)

    walk(module, "", "")

    def canonical(key: str) -> str:
        cut = len(key)
        while (cut := key.rfind(".", 0, cut)) >= 0:  # hooks may add keys below a module's own
            if key[: cut + 1] in prefixes:
                return prefixes[key[: cut + 1]] + key[cut + 1 :]
        return prefixes[""] + key

    # A shared submodule was walked once, under its first name. Its other names keep their prefix,
    # so wrappers must be found in these names too.
    owners: dict[str, nn.Module] = {}
    for raw, part in module.named_modules(remove_duplicate=False):
        owners[raw] = part
        if raw and f"{raw}." not in prefixes:
            parent, _, last = raw.rpartition(".")
            above = prefixes[f"{parent}." if parent else ""]
            wrapped = is_wrapped(owners[parent], last)
            prefixes[f"{raw}."] = above if wrapped else f"{above}{last}."
    return canonical


def is_wrapped(owner: nn.Module, child: str) -> bool:
    """Whether the owner is a wrapper, and the child of this name is the module that it wraps."""
    if child in _WRAPPED:
        own = (*owner.parameters(recurse=False), *owner.buffers(recurse=False))
        return len(child_names(owner)) == 1 and not own
    return child == "module" and isinstance(
        owner, (nn.parallel.DistributedDataParallel, nn.DataParallel)
    )


@dataclass(frozen=True, slots=True)
class NamedState:
    """A module's state dict, not detached, and the canonical name of each key."""

    tensors: dict[str, Any]
    names: dict[str, str]
    at: str = ""

    def by_name(self) -> dict[str, Any]:
        """Return the state dict under canonical names.

        Raises:
            StateError: Two keys have the same name.
        """
        counts = Counter(self.names[key] for key in self.tensors)
        if len(counts) < len(self.tensors):
            ((name, _),) = counts.most_common(1)
            raise StateError(
                "Two entries of a module have the same name",
                tensor=below(self.at, name),
                expected="different names without the prefixes of wrappers",
                actual=", ".join(key for key in self.tensors if self.names[key] == name),
                remedy="rename one of them in the module's state_dict()",
            )
        return {self.names[key]: value for key, value in self.tensors.items()}


def named_state(module: nn.Module, *, at: str = "", keep_vars: bool = True) -> NamedState:
    """Read the module at a name in the state. With `keep_vars=False` the tensors are aliases
    without gradients.
    """
    with reading_state(module, at=at):
        state = module.state_dict(keep_vars=True) if keep_vars else aliases(module)
    return NamedState(state, _canonical_names(module, state), at)


def aliases(module: nn.Module) -> dict[str, Any]:
    """Return the state dict of a module, with tensors without gradients that share its memory.

    Unlike state_dict(), it keeps the attributes with which parameters describe their shards.
    """
    state = module.state_dict(keep_vars=True)
    for key, value in state.items():
        if (
            isinstance(value, torch.Tensor)
            and not is_lazy(value)
            and (is_parameter(value) or value.requires_grad)
        ):
            state[key] = carry_layout(value, value.detach())
    return state


def module_state(module: nn.Module, *, at: str = "") -> dict[str, Any]:
    """Return the module's state dict under canonical names. Its tensors alias those of the
    module.
    """
    return named_state(module, at=at, keep_vars=False).by_name()


def ddp_rank0_buffers(module: nn.Module) -> set[str]:
    """Return the canonical names of the buffers for which DDP uses the values of its rank 0.

    DDP replaces these buffers before each forward. Until then, batch norms let them drift.
    """
    names: dict[str, str] | None = None
    buffers: set[str] = set()
    for prefix, part in module.named_modules():
        if (
            isinstance(part, nn.parallel.DistributedDataParallel)
            and part.broadcast_buffers
            and dist.get_rank(part.process_group) > 0
        ):
            names = names or canonical_names(module)
            raw = (key for key, _ in part.named_buffers(prefix=prefix))
            buffers.update(names[key] for key in raw if key in names)
    return buffers


def parameter_names(module: nn.Module) -> Mapping[int, str]:
    """Return the canonical name of each parameter of a module, by the id of the parameter."""
    return names_by_identity(module, named_state(module))


def names_by_identity(module: nn.Module, state: NamedState) -> Mapping[int, str]:
    """Return what `parameter_names` returns, for a module that has just been read."""
    own = {key: id(value) for key, value in state.tensors.items() if is_parameter(value)}
    known = _by_identity.get(module)
    if known is not None and known[0] == own and known[1] is state.names:
        return known[2]
    canonical = canonical_names(module)
    names = {id(parameter): canonical[raw] for raw, parameter in module.named_parameters()}
    if names.keys() <= set(own.values()):  # otherwise it depends on more than the state
        _by_identity[module] = own, state.names, names
    return names
