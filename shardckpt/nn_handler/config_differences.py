"""Differences between the configurations of a handler and of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from shardckpt.errors import LoadMismatchError
from shardckpt.logs import warn
from shardckpt.nn_handler.components import Components
from shardckpt.nn_handler.optimization import MAIN
from shardckpt.nn_handler.saved import Config, NamedOptimizer

__all__ = [
    "check_components",
    "optimizers_of",
    "own_parts",
    "place_of",
    "warn_of_loss",
    "warn_of_options",
]


def optimizers_of(config: Config) -> dict[str, NamedOptimizer]:
    """Return all optimizers of a checkpoint by name, each with its scheduler."""
    main = config.optimizer
    named = {MAIN: NamedOptimizer(optimizer=main, scheduler=config.scheduler)} if main else {}
    return {**named, **config.optimizers}


def place_of(name: str, part: str) -> str:
    """Return the place of an optimizer or a scheduler in the configuration."""
    return part if name == MAIN else f"optimizers.{name}.{part}"


def warn_of_loss(own: Any, saved: Any, rank: int) -> None:
    """Warn of tensors among the arguments of the loss that those of the checkpoint replace."""
    changed = _other_tensors(own, saved)
    if changed and rank == 0:
        warn(
            f"The loss gets its tensors from the checkpoint: {', '.join(changed)} had other values "
            "in the script. To use those, call set_loss_fn after the load, or in a callback's "
            "on_train_start"
        )


def _other_tensors(own: Any, saved: Any, at: str = "") -> list[str]:
    """Return the places of tensors that differ in two descriptions."""
    if isinstance(own, torch.Tensor) and isinstance(saved, torch.Tensor):
        alike = own.shape == saved.shape and own.dtype == saved.dtype
        return [] if alike and torch.equal(own.cpu(), saved.cpu()) else [at]
    if not (isinstance(own, dict) and isinstance(saved, dict)):
        return []
    return [
        place
        for name in own.keys() & saved.keys()
        for place in _other_tensors(own[name], saved[name], str(name))
    ]


def own_parts(own: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizers and schedulers in a handler's own configuration, by their place."""
    parts = {"optimizer": own["optimizer"], "scheduler": own["scheduler"]}
    for name, one in own["optimizers"].items():
        parts |= {place_of(name, part): one[part] for part in ("optimizer", "scheduler")}
    return {at: part for at, part in parts.items() if part}


def _saved_parts(config: Config) -> dict[str, Any]:
    """Return the optimizers and schedulers in a checkpoint, by their place."""
    parts: dict[str, Any] = {"scheduler": config.scheduler}
    for name, one in optimizers_of(config).items():
        parts |= {place_of(name, "optimizer"): one.optimizer}
        parts |= {place_of(name, "scheduler"): one.scheduler}
    return {at: part for at, part in parts.items() if part}


def warn_of_options(own: dict[str, Any], saved: Config, handler: Components) -> None:
    """Warn of options of optimizers and schedulers that the checkpoint replaces."""
    changed = []
    for at, found in _saved_parts(saved).items():
        mine, theirs = own[at]["options"], found.options
        name = at.split(".")[1] if "." in at else MAIN
        set_anew = handler.hyperparameters.get(name, {}) if at.endswith("optimizer") else {}
        pairs = [(at, mine, theirs)]
        if at.endswith("optimizer"):
            groups = zip(own[at]["groups"], found.groups or (), strict=False)
            pairs += [(f"{at} group {n}", *both) for n, both in enumerate(groups)]
        changed += [
            f"{where} {option}: {there.get(option, 'its default')!r} in the checkpoint, "
            f"{here.get(option, 'its default')!r} in the script"
            for where, here, there in pairs
            for option in dict.fromkeys([*here, *there])
            if option != "params"
            and here.get(option) != there.get(option)
            and option not in set_anew
        ]
    if changed:
        warn(
            f"The checkpoint's options are used: {'; '.join(changed)[:1000]}. To change those of "
            "the optimizer and keep its moments, call "
            "handler.set_hyperparameters(lr=...) before train"
        )


def check_components(own: dict[str, Any], saved: Config, path: str) -> None:
    """Raise LoadMismatchError if an optimizer or scheduler is missing or of another class."""
    mine, theirs = own_parts(own), _saved_parts(saved)
    for at in dict.fromkeys([*mine, *theirs]):
        names = [
            mine[at]["class"] if at in mine else None,
            theirs[at].class_name if at in theirs else None,
        ]
        if names[0] == names[1] or all(name and "shardckpt.absent" in name for name in names):
            continue
        part = at.rpartition(".")[2]
        raise LoadMismatchError(
            f"The handler has another {part} than the checkpoint",
            path=path,
            tensor=at if "." in at else None,
            expected=next(iter((names[0] or {"": "none"}).values())),
            actual=next(iter((names[1] or {"": "none"}).values()), None),
            remedy=f"set_{part} as it was when this was saved; to change it, NNHandler.load with "
            f"skip_{part}=True, and then set_{part}",
        )
