"""Matching modules and optimizers of a caller's state against a saved one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardckpt.errors import StateError
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import TensorEntry
from shardckpt.format.typed_json import TensorRef
from shardckpt.state.local_chunks import is_distributed, local_tensor
from shardckpt.state.materialize import NOTHING
from shardckpt.state.module_state import canonical_names, optimizer_state
from shardckpt.state.saved_tree import below

if TYPE_CHECKING:
    from shardckpt.state.matching import Finish, Matcher

__all__ = ["match_module", "match_optimizer"]


def match_module(matcher: Matcher, module: nn.Module, name: str) -> Finish:
    """Fill a module's own tensors; what is not its own memory goes through load_state_dict."""
    matcher.owned.append(name)
    matcher.used.add(name)
    names = canonical_names(module)
    state = module.state_dict()
    parts = {
        key: _extra(matcher, value, below(name, names[key]))
        if key.endswith("_extra_state")
        else matcher.match(value, below(name, names[key]))
        for key, value in state.items()
    }
    own = {storage_of(t) for t in (*module.parameters(), *module.buffers())}
    # Buffers that a module does not save, on the meta device: no load can fill them.
    matcher.mismatches.missing += [
        below(name, key) for key, t in module.named_buffers() if t.is_meta and key not in state
    ]

    def finish() -> nn.Module:
        assign: dict[str, Any] = {}
        hand_over: dict[str, Any] = {}
        for key, part in parts.items():
            before, after = state[key], part()
            if isinstance(before, torch.Tensor) and before.is_meta:
                if after is not before:
                    assign[key] = after
            elif not (isinstance(before, torch.Tensor) and storage_of(before) in own):
                hand_over[key] = after
        if hand_over:
            module.load_state_dict(hand_over, strict=False)
        if assign:
            _assign(module, assign)
        return module

    return finish


def _extra(matcher: Matcher, value: Any, name: str) -> Finish:
    """What a module's set_extra_state takes: as saved, whatever get_extra_state returns now."""
    found = matcher.build(name, like=value)
    return lambda: value if found is NOTHING else found


def _assign(module: nn.Module, tensors: dict[str, Any]) -> None:
    """Put new tensors in place of those on the meta device; tied parameters stay tied."""
    tied: dict[int, list[str]] = {}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(key)
    module.load_state_dict(tensors, strict=False, assign=True)
    for first, *others in tied.values():
        for other in others:
            owner, _, last = other.rpartition(".")
            setattr(module.get_submodule(owner), last, module.get_parameter(first))


def storage_of(tensor: torch.Tensor) -> int:
    """What the local memory of a tensor is known by; equal for views of one storage."""
    local = local_tensor(tensor)
    return id(tensor) if local is None else local.untyped_storage()._cdata


def match_optimizer(matcher: Matcher, optimizer: Optimizer, name: str) -> Finish:
    """Fill an optimizer's state by parameter name, whatever state it has had so far.

    Afterwards its state is what was saved: state that a parameter had not yet is made like
    the parameter, state that was not saved is dropped.
    """
    if name not in matcher.saved.nodes:
        if matcher.saved.selected(name):
            matcher.mismatches.missing.append(name)
        return lambda: optimizer
    matcher.owned.append(name)
    current = optimizer_state(optimizer, matcher.parameter_names(), at=name)
    parameters = {
        matcher.parameter_names()[id(parameter)]: parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    groups, known = _groups(matcher, name, current["param_groups"])
    matcher.used.add(below(name, "state"))
    filled: dict[str, dict[str, Any] | None] = {}
    for fqn, parameter in parameters.items():
        mine = current["state"].get(fqn)
        place = below(name, f"state.{fqn}")
        filled[fqn] = _state(matcher, place, parameter, mine or {}) if fqn in known else mine

    def finish() -> Optimizer:
        packed = optimizer.state_dict()["param_groups"]
        order = [index for group in packed for index in group["params"]]
        state = {
            index: filled[fqn] for index, fqn in zip(order, parameters, strict=True) if filled[fqn]
        }
        merged = [
            {**own, **saved, "params": own["params"]}
            for own, saved in zip(packed, groups, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": merged})
        _undo_casts(optimizer, parameters, filled)
        return optimizer

    return finish


def _undo_casts(
    optimizer: Optimizer,
    parameters: dict[str, torch.Tensor],
    filled: dict[str, dict[str, Any] | None],
) -> None:
    # Optimizer.load_state_dict casts state to the parameter's dtype; what was saved wins, such as
    # float32 moments of bfloat16 parameters.
    for fqn, parameter in parameters.items():
        for key, value in (filled[fqn] or {}).items():
            now = optimizer.state[parameter].get(key)
            if (
                isinstance(value, torch.Tensor)
                and now is not None
                and now.dtype != value.dtype
                and key != "step"
            ):
                optimizer.state[parameter][key] = value.to(now.device)


def _state(
    matcher: Matcher, name: str, parameter: torch.Tensor, current: dict[str, Any]
) -> dict[str, Any] | None:
    """The saved state of one parameter, its tensors to be read; None where there was none."""
    node = matcher.saved.nodes.get(name)
    if not isinstance(node, dict):
        return None
    matcher.used.add(name)
    if parameter.is_meta:
        raise StateError(
            "An optimizer over parameters on the meta device can't be loaded",
            tensor=name,
            expected="parameters with memory",
            actual="device meta",
            remedy="materialise the module first (to_empty), then create the optimizer",
        )
    filled: dict[str, Any] = {}
    for key, item in node.items():
        place, tensor = below(name, key), current.get(key)
        if isinstance(item, TensorRef) and item.kind == "tensor":
            entry = matcher.saved.manifest.tensors[item.name]
            if not (isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == entry.shape):
                tensor = _like(parameter, entry)
            filled[key] = matcher.tensor(tensor, place)
        else:
            filled[key] = matcher.build(place)
    return filled


def _like(parameter: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """An empty tensor for saved optimizer state: sharded as the parameter if of its shape."""
    dtype = DTYPES[entry.dtype]
    if tuple(parameter.shape) == entry.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    device: Any = "cpu" if not entry.shape or is_distributed(parameter) else parameter.device
    return torch.empty(entry.shape, dtype=dtype, device=device)


def _groups(
    matcher: Matcher, name: str, current: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], set[str]]:
    """For each parameter group of the optimizer, the options saved for its parameters; and the
    names of the parameters that were saved."""
    saved = matcher.build(below(name, "param_groups"))
    prefix = below(name, "state.")
    of_parameter = {
        matcher.saved.renamed(prefix + fqn).removeprefix(prefix): group
        for group in (saved if isinstance(saved, list) else [])
        for fqn in group["params"]
    }
    local = {fqn for group in current for fqn in group["params"]}
    place = below(name, "param_groups")
    missing, unexpected = local - of_parameter.keys(), of_parameter.keys() - local
    matcher.mismatches.missing += [f"{place}.{fqn}" for fqn in sorted(missing)]
    matcher.mismatches.unexpected += [f"{place}.{fqn}" for fqn in sorted(unexpected)]
    groups = []
    for number, group in enumerate(current):
        found = [of_parameter[fqn] for fqn in group["params"] if fqn in of_parameter]
        if any(other is not found[0] for other in found):
            raise StateError(
                "A parameter group holds parameters that were saved in different groups",
                tensor=f"{place}.{number}",
                expected="parameters grouped as they were when saved",
                actual=f"{len({id(other) for other in found})} saved groups in one",
                remedy="create the optimizer with the same parameter groups",
            )
        groups.append({k: v for k, v in found[0].items() if k != "params"} if found else {})
    return groups, set(of_parameter)
