"""Parameter groups by name, so that a checkpoint can say which parameter is in which."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardckpt.errors import StateError
from shardckpt.state.module_state import parameter_names

__all__ = ["Choice", "Groups", "group_names", "grouped"]

Choice = str | torch.Tensor | Callable[[str, nn.Parameter], bool]
"""Parameters: a name, a prefix of names, a pattern such as `*.bias`, a parameter, or a function of
(name, parameter)."""
Groups = Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]


def grouped(
    module: nn.Module,
    groups: Groups | None,
    loss: nn.Module | None = None,
    *,
    params: Choice | Iterable[Choice] | None = None,
    held: Mapping[str, str] | None = None,
    exact: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Build the groups of an optimizer, once with parameters and once with their names.

    Parameters of the loss have the prefix `loss_fn.` in their names.

    Args:
        module: The model.
        groups: See NNHandler.set_optimizer.
        loss: The loss, if it has parameters.
        params: The parameters of the optimizer; None means all that no other optimizer holds.
        held: The parameters of other optimizers: their names, and those of the optimizers.
        exact: Leave out parameters that are in no group. Otherwise those that need gradients
            become the first group.

    Raises:
        StateError: A group is empty, no group is given, or another optimizer holds a parameter.
    """
    if not _are_groups(groups):
        raise StateError(
            "Invalid groups",
            expected='a dict from parameters to options, as in {"head": {"lr": 0.1}}, or a list of '
            'dicts as in [{"params": "head", "lr": 0.1}]',
            actual=repr(groups)[:200],
        )
    if isinstance(groups, Mapping):
        groups = [{"params": [prefix], **options} for prefix, options in groups.items()]
    held = held or {}
    by_id, parameters = _named(module, loss)
    if params is None:
        parameters = {name: p for name, p in parameters.items() if name not in held}
    else:
        chosen_names = _choose(params, by_id, parameters, module)
        _check_free(chosen_names, held)
        parameters = {name: parameters[name] for name in chosen_names}
    taken: dict[str, None] = {}
    chosen, named = [], []
    for group in groups or ():
        wanted = group.get("params")
        names = [n for n in _choose(wanted, by_id, parameters, module) if n not in taken]
        taken.update(dict.fromkeys(names))
        options = {key: value for key, value in group.items() if key != "params"}
        chosen.append({"params": [parameters[name] for name in names], **options})
        named.append({"params": names, **options})
    rest = [name for name, p in parameters.items() if name not in taken and p.requires_grad]
    if rest and not exact:
        chosen.insert(0, {"params": [parameters[name] for name in rest]})
        named.insert(0, {"params": rest})
    if not chosen:
        raise StateError(
            "The optimizer would have no parameter",
            expected="a parameter that needs gradients and that no other optimizer holds",
            actual=f"{len(parameters)} free parameters, all frozen",
            remedy="choose the parameters of each optimizer with params=, or unfreeze some: "
            "handler.freeze_module(name, freeze=False)",
        )
    return chosen, named


def _are_groups(groups: Any) -> bool:
    if groups is None:
        return True
    if not isinstance(groups, (Mapping, list, tuple)):
        return False
    items = groups.values() if isinstance(groups, Mapping) else groups
    return all(isinstance(options, Mapping) for options in items)


def _choose(
    wanted: Any, by_id: Mapping[int, str], parameters: Mapping[str, Any], module: nn.Module
) -> list[str]:
    """Return the names that the choices select, each once. StateError for an empty result."""
    choices = [wanted] if isinstance(wanted, (str, torch.Tensor)) or callable(wanted) else wanted
    choices = choices if isinstance(choices, Iterable) else ()
    found = [name for choice in choices for name in _matching(choice, by_id, parameters)]
    if not found:
        raise StateError(
            "A parameter group holds no parameter",
            expected="parameters of the model, their names, prefixes or patterns of them, or a "
            "function of (name, parameter)",
            actual=repr(wanted)[:200],
            remedy="choose among " + ", ".join(sorted(dict(module.named_children()))),
        )
    return list(dict.fromkeys(found))


def _matching(wanted: Any, by_id: Mapping[int, str], parameters: Mapping[str, Any]) -> list[str]:
    if isinstance(wanted, torch.Tensor):
        name = by_id.get(id(wanted))
        return [name] if name in parameters and name is not None else []
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if callable(wanted):
        return [name for name, parameter in trained.items() if wanted(name, parameter)]
    pattern = str(wanted)
    if any(sign in pattern for sign in "*?["):
        return [name for name in trained if fnmatch.fnmatchcase(name, pattern)]
    prefix = pattern.rstrip(".")
    return [
        name
        for name in parameters
        if name == prefix or (name.startswith(f"{prefix}.") and name in trained)
    ]


def _check_free(names: Collection[str], held: Mapping[str, str]) -> None:
    taken = [name for name in names if name in held]
    if taken:
        raise StateError(
            "Two optimizers would hold the same parameters",
            actual=f"{', '.join(taken[:4])}: held by the optimizer {held[taken[0]]!r}",
            remedy="choose the parameters of each optimizer with params=",
        )


def group_names(
    optimizer: torch.optim.Optimizer, module: nn.Module, loss: nn.Module | None
) -> list[list[str]]:
    """Return the names of the parameters in each group of an optimizer, as `grouped` takes them.

    Raises StateError for parameters that the model does not have.
    """
    by_id, _ = _named(module, loss)
    lost = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in by_id]
    if lost:
        raise StateError(
            "The optimizer holds parameters that the model does not have",
            actual=f"{len(lost)} of them, such as one of shape {tuple(lost[0].shape)}",
            remedy="call set_optimizer after a change of the model or the loss",
        )
    return [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _named(
    module: nn.Module, loss: nn.Module | None
) -> tuple[dict[int, str], dict[str, nn.Parameter]]:
    """Return the parameters of a model and its loss: names by id, and parameters by name."""
    by_id = dict(parameter_names(module))
    parameters = {by_id[id(p)]: p for p in module.parameters()}
    for name, parameter in loss.named_parameters() if loss is not None else ():
        if id(parameter) not in by_id:
            by_id[id(parameter)] = f"loss_fn.{name}"
            parameters[f"loss_fn.{name}"] = parameter
    return by_id, parameters
