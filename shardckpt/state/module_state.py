"""Modules as plain dicts with canonical names.

Names are those of the module as its author wrote it: without the `module.` of DDP, the
`_orig_mod.` of torch.compile or the prefix of activation checkpointing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from shardckpt.errors import StateError, UnsupportedLeafError
from shardckpt.format.typed_json import record_of
from shardckpt.state.markers import FromRank0, PerRank, Union
from shardckpt.state.refusals import reading_state
from shardckpt.state.sharded_tensors import carry_layout

__all__ = [
    "ModuleState",
    "OwnState",
    "aliases",
    "canonical_names",
    "foreign_buffers",
    "has_state",
    "is_parameter",
    "is_wrapped",
    "module_state",
    "modules_in",
    "names_by_identity",
    "own_state",
    "parameter_names",
]

_LEAVES = (torch.Tensor, str, int, float, type(None))
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module"}

# What the walks over a module found, with all that it depends on: most of the time a save takes.
_canonical: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, str]]] = WeakKeyDictionary()
_by_identity: WeakKeyDictionary[nn.Module, tuple[Any, Any, dict[int, str]]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class ModuleState:
    """A module read out: its entries by canonical name, which of them may be taken to stay as
    they are (see file_groups), and those that are another rank's (see foreign_buffers)."""

    entries: dict[str, Any]
    frozen: Set[str]
    foreign: Set[str]


def has_state(value: Any) -> bool:
    """Whether the value saves and restores itself through state_dict and load_state_dict."""
    return (
        not isinstance(value, (type, Mapping))
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def modules_in(state: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module in a nested state, outermost modules only."""
    stack: list[tuple[tuple[str, ...], Any]] = [((), state)]
    seen: set[int] = set()
    while stack:
        path, value = stack.pop()
        if isinstance(value, (Union, PerRank, FromRank0)):
            value = value.value
        if isinstance(value, nn.Module):
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
                if not isinstance(item, _LEAVES)  # as most are
            )


def canonical_names(module: nn.Module) -> dict[str, str]:
    """Key of `module.state_dict()` -> canonical name.

    Raises UnsupportedLeafError for FSDP1, whose flat parameters have no names of their own.
    """
    keys = dict.fromkeys(module.state_dict(keep_vars=True))
    keys.update(dict.fromkeys(name for name, _ in module.named_parameters()))
    return _canonical_names(module, keys)


def _canonical_names(module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    depends_on = (list(keys), _kinds(module))
    known = _canonical.get(module)
    if known is None or known[0] != depends_on:
        canonical = _canonicaliser(module)
        known = _canonical[module] = depends_on, {key: canonical(key) for key in keys}
    return known[1]


def _kinds(module: nn.Module) -> list[type]:
    return [type(part) for part in module.modules()]


def _canonicaliser(module: nn.Module) -> Callable[[str], str]:
    prefixes: dict[str, str] = {}

    def walk(owner: nn.Module, raw: str, canonical: str) -> None:
        prefixes[raw] = canonical
        if type(owner).__name__ == "FullyShardedDataParallel":
            raise UnsupportedLeafError(
                "An FSDP1 module can't be handed over directly",
                tensor=canonical.rstrip(".") or None,
                expected="a plain module, or one under DDP, FSDP2 (fully_shard) or torch.compile",
                actual=type(owner).__qualname__,
                remedy="hand over the dicts that torch.distributed.checkpoint.state_dict."
                "get_state_dict() returns, or move to fully_shard",
            )
        for name, child in owner.named_children():
            own = canonical if is_wrapped(owner, name) else f"{canonical}{name}."
            walk(child, f"{raw}{name}.", own)

    walk(module, "", "")

    def canonical(key: str) -> str:
        cut = len(key)
        while (cut := key.rfind(".", 0, cut)) >= 0:  # hooks may add keys below a module's own
            if key[: cut + 1] in prefixes:
                return prefixes[key[: cut + 1]] + key[cut + 1 :]
        return prefixes[""] + key

    # A shared submodule is walked once, under its first name; later names keep the prefix they
    # have, so wrappers inside it must be looked for there as well.
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
    """Whether the child of this name is all that the owner, a wrapper, holds."""
    if child in _WRAPPED:
        return len(owner._modules) == 1 and not owner._parameters and not owner._buffers
    return child == "module" and isinstance(
        owner, (nn.parallel.DistributedDataParallel, nn.DataParallel)
    )


@dataclass(frozen=True, slots=True)
class OwnState:
    """A module's state dict of its own tensors, and the canonical name of each key."""

    tensors: dict[str, Any]
    names: dict[str, str]
    at: str = ""

    def by_name(self) -> dict[str, Any]:
        """The state dict under canonical names. Raises StateError for two keys with one name."""
        counts = Counter(self.names[key] for key in self.tensors)
        if len(counts) < len(self.tensors):
            ((name, _),) = counts.most_common(1)
            raise StateError(
                "Two entries of a module have the same name",
                tensor=_join(self.at, name),
                expected="different names without the prefixes of wrappers",
                actual=", ".join(key for key in self.tensors if self.names[key] == name),
                remedy="rename one of them in the module's state_dict()",
            )
        return {self.names[key]: value for key, value in self.tensors.items()}


def own_state(module: nn.Module, *, at: str = "", keep_vars: bool = True) -> OwnState:
    """Read a module, which stands at a name in the state; its tensors, or without `keep_vars`
    aliases of them."""
    with reading_state(module, at=at):
        state = module.state_dict(keep_vars=True) if keep_vars else aliases(module)
    return OwnState(state, _canonical_names(module, state), at)


def aliases(module: nn.Module) -> dict[str, Any]:
    """The state dict of a module, of tensors without gradients that share its memory. Unlike
    state_dict(), it keeps what parameters say of how they are sharded."""
    state = module.state_dict(keep_vars=True)
    for key, value in state.items():
        if (
            isinstance(value, torch.Tensor)
            and not is_lazy(value)
            and (is_parameter(value) or value.requires_grad)
        ):
            state[key] = carry_layout(value, value.detach())
    return state


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def module_state(module: nn.Module, *, at: str = "") -> dict[str, Any]:
    """The module's state dict under canonical names; tensors alias the module's own."""
    return own_state(module, at=at, keep_vars=False).by_name()


def foreign_buffers(module: nn.Module) -> set[str]:
    """Canonical names of the buffers of which this rank's values count for nothing: DDP replaces
    them by those of its rank 0 before each forward, and until then batch norms let them drift."""
    names: dict[str, str] | None = None
    found: set[str] = set()
    for prefix, part in module.named_modules():
        if (
            isinstance(part, nn.parallel.DistributedDataParallel)
            and part.broadcast_buffers
            and dist.get_rank(part.process_group) > 0
        ):
            names = names or canonical_names(module)
            raw = (key for key, _ in part.named_buffers(prefix=prefix))
            found.update(names[key] for key in raw if key in names)
    return found


def parameter_names(module: nn.Module) -> dict[int, str]:
    """id of a parameter -> its canonical name in its module."""
    return names_by_identity(module, own_state(module))


def names_by_identity(module: nn.Module, state: OwnState) -> dict[int, str]:
    """As parameter_names, of a module that has just been read."""
    own = {key: id(value) for key, value in state.tensors.items() if is_parameter(value)}
    known = _by_identity.get(module)
    if known is not None and known[0] == own and known[1] is state.names:
        return known[2]
    canonical = canonical_names(module)
    names = {id(parameter): canonical[raw] for raw, parameter in module.named_parameters()}
    if names.keys() <= set(own.values()):  # else it depends on more
        _by_identity[module] = own, state.names, names
    return names


def is_parameter(value: Any) -> bool:
    """isinstance(value, nn.Parameter), which is slow for DTensors; by the mark, private in torch
    2.13, that it looks at."""
    return type(value) is nn.Parameter or getattr(value, "_is_param", False)
