"""Parameter groups by name, so that a checkpoint can say which parameter is in which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardckpt.errors import StateError
from shardckpt.state.module_state import parameter_names

__all__ = ["Groups", "group_names", "grouped"]

Groups = Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]


def grouped(
    module: nn.Module,
    groups: Groups | None,
    loss: nn.Module | None = None,
    *,
    exact: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups for an optimizer, and the same with names in place of parameters.

    Parameters that need gradients and are in no group make the first one, unless the groups are
    `exact`, as a checkpoint's are. Groups that name theirs one by one take also those that need
    no gradients. Those of a loss are named `loss_fn.<name>`.
    """
    if isinstance(groups, Mapping):
        groups = [{"params": [prefix], **options} for prefix, options in groups.items()]
    by_id, parameters = _named(module, loss)
    taken: dict[str, None] = {}
    chosen, named = [], []
    for group in groups or ():
        names = [
            name
            for wanted in _listed(group.get("params"))
            for name in _matching(wanted, by_id, parameters)
            if name not in taken
        ]
        if not names:
            raise StateError(
                "A parameter group holds no parameter",
                expected="parameters of the model, their names, or prefixes of them",
                actual=repr(group.get("params")),
                remedy="choose among " + ", ".join(sorted(dict(module.named_children()))),
            )
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
            expected="a model with parameters that need gradients",
            actual=f"{len(parameters)} parameters, all frozen",
            remedy="unfreeze some first: handler.freeze_module(name, freeze=False)",
        )
    return chosen, named


def group_names(
    optimizer: torch.optim.Optimizer, module: nn.Module, loss: nn.Module | None
) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer, as `grouped` takes them."""
    by_id, _ = _named(module, loss)
    return [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _named(
    module: nn.Module, loss: nn.Module | None
) -> tuple[dict[int, str], dict[str, nn.Parameter]]:
    """id -> name, and name -> parameter, of a model and its loss."""
    by_id = parameter_names(module)
    parameters = {by_id[id(p)]: p for p in module.parameters()}
    for name, parameter in loss.named_parameters() if loss is not None else ():
        if id(parameter) not in by_id:
            by_id[id(parameter)] = f"loss_fn.{name}"
            parameters[f"loss_fn.{name}"] = parameter
    return by_id, parameters


def _listed(wanted: Any) -> Iterable[Any]:
    if isinstance(wanted, (str, torch.Tensor)):
        return [wanted]
    return wanted if isinstance(wanted, Iterable) else ()


def _matching(wanted: Any, by_id: Mapping[int, str], parameters: Mapping[str, Any]) -> list[str]:
    if isinstance(wanted, torch.Tensor):
        return [by_id[id(wanted)]] if id(wanted) in by_id else []
    prefix = str(wanted).rstrip(".")
    return [
        name
        for name, parameter in parameters.items()
        if name == prefix or (f"{name}.".startswith(f"{prefix}.") and parameter.requires_grad)
    ]
