"""One optimizer of a handler, with the arguments that made it and its scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardckpt.errors import StateError
from shardckpt.nn_handler.groups import group_names
from shardckpt.nn_handler.objects import describe
from shardckpt.nn_handler.scheduling import Scheduler

__all__ = ["MAIN", "Optimization"]

MAIN = "main"
"""The name of the optimizer that set_optimizer makes by default."""


@dataclass(eq=False, slots=True, kw_only=True)
class Optimization:
    """An optimizer and its scheduler.

    `recipe` holds the arguments of set_optimizer, with the names of the parameters of each group.
    """

    optimizer: torch.optim.Optimizer
    recipe: dict[str, Any]
    scheduler: Scheduler | None = None

    @property
    def needs_closure(self) -> bool:
        """Whether a step computes the loss by itself, several times, as LBFGS does."""
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty

    @property
    def rates(self) -> list[float]:
        """The learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise StateError for options that the optimizer does not have."""
        for name, value in options.items():
            if name not in self.optimizer.defaults:
                raise StateError(
                    "The optimizer has no such option",
                    expected=", ".join(sorted(self.optimizer.defaults)),
                    actual=name,
                )
            number = isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)
            if name == "lr" and not (number and value >= 0):
                raise StateError("Invalid rate", expected="a number from 0", actual=repr(value))

    def set_options(self, options: Mapping[str, Any]) -> None:
        """Set options in all groups; a new rate also scales the schedule."""
        self.check_options(options)
        for name, value in options.items():
            self.optimizer.defaults[name] = value
            for group in self.optimizer.param_groups:
                base = group.get("max_lr", group.get("initial_lr"))  # max_lr of OneCycleLR
                if name != "lr" or not base:
                    group[name] = value
                    continue
                for rate in ("lr", "initial_lr", "max_lr", "min_lr"):
                    if rate in group and base != value:
                        group[rate] = value if group[rate] == base else group[rate] * value / base
            if name == "lr" and self.scheduler is not None:
                self.scheduler.set_base(float(value))

    def description(self, module: nn.Module, loss: nn.Module | None) -> dict[str, Any]:
        """Return the arguments of set_optimizer as plain data, with the groups as they are now."""
        begun, defaults = self.recipe["groups"], self.optimizer.defaults
        names = group_names(self.optimizer, module, loss)
        groups = []
        for number, group in enumerate(self.optimizer.param_groups):
            known = begun[number] if number < len(begun) else None
            options = {k: v for k, v in group.items() if k in defaults} if known is None else known
            groups.append({**options, "params": names[number]})
        described: dict[str, Any] = describe({**self.recipe, "groups": groups})
        return described
