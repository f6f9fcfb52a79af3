"""Match modules of a caller's state against a saved one."""

from __future__ import annotations

import collections
import inspect
from typing import Any

import torch
from torch import nn

from shardckpt.state.flatten import Ties
from shardckpt.state.local_chunks import Shards, local_tensor
from shardckpt.state.match_context import Finish, Match, MatchContext
from shardckpt.state.materialize import NOTHING
from shardckpt.state.module_state import aliases, canonical_names, is_wrapped
from shardckpt.state.refusals import reading_state, setting_state
from shardckpt.state.saved_tree import below
from shardckpt.state.wrapper_tensors import Wrapped, saveable_form
from shardckpt.torch_compat import carry_versions, load_functions, storage_id

__all__ = ["has_custom_load", "match_module"]


def match_module(context: MatchContext, template: nn.Module, name: str, match: Match) -> Finish:
    """Fill a module's own tensors in place.

    Entries whose memory is not that of the module's tensors are loaded with its load_state_dict. If
    the module overrides load_state_dict or has hooks on it, all entries are.
    """
    context.owners.append(name)
    context.used.add(name)
    module = _unwrapped(template)
    with reading_state(template, at=name):
        names = canonical_names(module)
        state = aliases(module)
    entries = {
        key: _extra(context, value, below(name, names[key]))
        if _is_extra(key)
        else match(context, value, below(name, names[key]))
        for key, value in state.items()
    }
    own = {at for t in (*module.parameters(), *module.buffers()) for at in storages_of(t)}
    # Non-persistent buffers on the meta device are missing, as no load can fill them.
    context.mismatches.missing += [
        below(name, key) for key, t in module.named_buffers() if t.is_meta and key not in state
    ]

    context.mismatches.unexpected += [below(name, key) for key in _refused_keys(module, state, own)]

    def finish() -> nn.Module:
        assign, not_filled, every = (_like(state) for _ in range(3))
        for key, entry in entries.items():
            before, after = state[key], entry()
            every[key] = after
            if isinstance(before, torch.Tensor) and before.is_meta:
                if after is not before:
                    assign[key] = after
            elif _is_extra(key) or not (
                isinstance(before, torch.Tensor) and storages_of(before) <= own
            ):
                not_filled[key] = after
        if assign:
            _fill_tied(state, assign, every)
        with setting_state(template, at=name):
            if assign:
                _assign(module, assign)
            if has_custom_load(module):
                _load_state_dict(module, every)
            elif not_filled:
                module.load_state_dict(not_filled, strict=False)
        return template

    return finish


def _refused_keys(module: nn.Module, state: Any, own: set[Any]) -> list[str]:
    """List the keys of a state dict that torch's load_state_dict would not take: a hook added
    them to the state dict, and no code of the module takes them back.
    """
    others = [
        key
        for key, value in state.items()
        if not _is_extra(key)
        and not (isinstance(value, torch.Tensor) and (value.is_meta or storages_of(value) <= own))
    ]
    if not others or has_custom_load(module):
        return []
    tensors = (module.named_parameters, module.named_buffers)
    taken = {key for named in tensors for key, _ in named(remove_duplicate=False)}
    return [key for key in others if key not in taken]


def _like(state: Any) -> Any:
    """Return an empty state dict with a copy of the module versions, in which torch notes
    `assign`.
    """
    empty = collections.OrderedDict[str, Any]()
    carry_versions(state, empty)
    return empty


def _is_extra(key: str) -> bool:
    return key.rpartition(".")[2] == "_extra_state"


def _extra(context: MatchContext, value: Any, name: str) -> Finish:
    """Build the saved argument of a module's set_extra_state."""
    saved = context.build(name, like=value)
    return lambda: value if saved is NOTHING else saved


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers, as their load_state_dict would not call that of the
    module.
    """
    while type(module).load_state_dict is nn.Module.load_state_dict:
        children = dict(module.named_children())
        inner = next((children[n] for n in children if is_wrapped(module, n)), None)
        if inner is None or len(children) > 1:
            break
        module = inner
    return module


def has_custom_load(module: nn.Module) -> bool:
    """Whether load_state_dict runs other code than torch's: an override or a hook.

    torch's own code does nothing to tensors that were filled in place.
    """
    if not _is_torchs(module.load_state_dict):
        return True
    return not all(_is_torchs(own) for part in module.modules() for own in load_functions(part))


def _is_torchs(function: Any) -> bool:
    while (inner := getattr(function, "hook", None) or getattr(function, "func", None)) is not None:
        function = inner  # torch's _WrappedHook, functools.partial
    origin = getattr(function, "__module__", None) or type(function).__module__
    return origin == "torch" or (origin.startswith("torch.") and not origin.startswith("torch.ao."))


def _load_state_dict(module: nn.Module, state: Any) -> None:
    """Call a module's load_state_dict with its own, already filled tensors.

    torch does not copy a tensor onto itself, so this costs little more than the module's own code.
    """
    taken = inspect.signature(module.load_state_dict).parameters
    if "strict" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        module.load_state_dict(state, strict=False)
    else:
        module.load_state_dict(state)


def _fill_tied(state: dict[str, Any], assign: dict[str, Any], every: dict[str, Any]) -> None:
    """Give the new tensor that takes the place of one on the meta device to all tied names, so that
    no code of the module gets a tensor without values.
    """
    ties = Ties()
    meta = [k for k, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]
    firsts = {key: ties.first(state[key], key) for key in meta}
    new: dict[str, Any] = {}
    for key, tensor in assign.items():
        new.setdefault(firsts[key], tensor)
    for key, first in firsts.items():
        if first in new:
            assign[key] = every[key] = new[first]


def _assign(module: nn.Module, tensors: dict[str, Any]) -> None:
    """Replace tensors on the meta device by new ones. Tied parameters stay tied."""
    tied: dict[int, list[str]] = {}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(key)
    nn.Module.load_state_dict(module, tensors, strict=False, assign=True)
    for first, *others in tied.values():
        for other in others:
            owner, _, last = other.rpartition(".")
            setattr(module.get_submodule(owner), last, module.get_parameter(first))


def storages_of(tensor: torch.Tensor) -> set[int]:
    """Return the ids of the storages of a tensor's local memory, equal for views of one storage."""
    tensor_or_shards = saveable_form(tensor, name="")
    if isinstance(tensor_or_shards, Wrapped):
        return {at for inner in tensor_or_shards.inner.values() for at in _storages(inner)}
    return _storages(tensor_or_shards)


def _storages(tensor: Any) -> set[int]:
    if isinstance(tensor, Shards):
        return {storage_id(chunk.data) for chunk in tensor.chunks}
    local = local_tensor(tensor)
    return {id(tensor)} if local is None else {storage_id(local)}
