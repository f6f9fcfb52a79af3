"""A learning-rate scheduler, with the arguments that made it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from shardckpt.errors import StateError
from shardckpt.nn_handler.objects import describe
from shardckpt.torch_compat import inner_schedulers

__all__ = ["Scheduler"]

Interval = Literal["epoch", "step"]


class Scheduler:
    """Creates the scheduler `torch` as scheduler_class(optimizer, **options).

    The option `schedulers` of SequentialLR and ChainedScheduler is a list of pairs: a class and its
    options. The `interval` None is "step" for OneCycleLR and CyclicLR, and "epoch" for all others.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler_class: Callable[..., Any],
        options: Mapping[str, Any],
        *,
        interval: Interval | None = None,
        monitor: str = "val_loss",
    ) -> None:
        if interval not in (None, "epoch", "step"):
            raise StateError(
                "Invalid value for interval", expected='"epoch" or "step"', actual=repr(interval)
            )
        self.torch = _make(optimizer, scheduler_class, options)
        if interval == "step" and self.needs_metric:
            raise StateError(
                "ReduceLROnPlateau needs the metrics of an epoch",
                expected='interval="epoch"',
                actual='interval="step"',
            )
        by_step = isinstance(self.torch, (OneCycleLR, CyclicLR))
        self.interval: Interval = interval or ("step" if by_step else "epoch")
        self.monitor = monitor
        self._class, self._options = scheduler_class, dict(options)

    def for_optimizer(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        """Return a new scheduler of the same kind for another optimizer."""
        return Scheduler(
            optimizer, self._class, self._options, interval=self.interval, monitor=self.monitor
        )

    def set_base(self, rate: float) -> None:
        """Set the rate that the schedule scales."""
        for scheduler in (self.torch, *inner_schedulers(self.torch)):
            bases = getattr(scheduler, "base_lrs", [])
            if hasattr(scheduler, "max_lrs"):  # of CyclicLR
                pairs = zip(scheduler.max_lrs, bases, strict=True)
                scheduler.max_lrs = [most * rate / base if base else most for most, base in pairs]
            if bases and not isinstance(scheduler, OneCycleLR):  # its rates are in the groups
                scheduler.base_lrs = [rate] * len(bases)

    @property
    def needs_metric(self) -> bool:
        """Whether it needs the metric `monitor`."""
        return isinstance(self.torch, ReduceLROnPlateau)

    def get_last_lr(self) -> list[float]:
        """Return the rate of each parameter group, as the scheduler of torch returns it."""
        return [float(rate) for rate in self.torch.get_last_lr()]

    def after_step(self) -> None:
        """Step, if the interval is "step". Called after each step of the optimizer."""
        if self.interval == "step":
            self.torch.step()

    def after_epoch(self, results: Mapping[str, float]) -> None:
        """Step, if the interval is "epoch". Called after each epoch."""
        if self.needs_metric:
            if self.monitor in results:
                self.torch.step(results[self.monitor])
        elif self.interval == "epoch":
            self.torch.step()

    def description(self) -> dict[str, Any]:
        """Return the arguments of set_scheduler as plain data."""
        return {
            "class": describe(self._class),
            "options": describe(self._options),
            "interval": self.interval,
            "monitor": self.monitor,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the torch scheduler, without functions."""
        state: dict[str, Any] = _without_functions(self.torch.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what state_dict returned. Dicts become Counters again."""
        _load(self.torch, dict(state))


def _make(
    optimizer: torch.optim.Optimizer, cls: Callable[..., Any], options: Mapping[str, Any]
) -> Any:
    options = dict(options)
    if cls in (SequentialLR, ChainedScheduler) and "schedulers" in options:
        options["schedulers"] = [
            _make(optimizer, *_class_and_options(pair)) for pair in options["schedulers"]
        ]
    return cls(optimizer=optimizer, **options)


def _class_and_options(pair: Any) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """Return the class and options of an inner scheduler. Raises StateError for an instance."""
    listed = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not (listed and callable(pair[0]) and isinstance(pair[1], Mapping)):
        raise StateError(
            "The option schedulers has an item that is not a pair",
            expected="a class and its options, as in (LinearLR, {'total_iters': 6})",
            actual=f"an instance of {type(pair).__name__}",
            remedy="write schedulers=[(LinearLR, {'total_iters': 6}), ...]",
        )
    return pair[0], pair[1]


def _without_functions(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_functions(item) for key, item in value.items() if not callable(item)}
    if type(value) in (list, tuple):
        return type(value)(_without_functions(item) for item in value)
    return value


def _load(scheduler: Any, state: dict[str, Any]) -> None:
    _check_state(scheduler, state)
    _restore_counters(scheduler, state)
    for part, own in zip(inner_schedulers(scheduler), state.get("_schedulers", ()), strict=True):
        _check_state(part, own)
        _restore_counters(part, own)
    scheduler.load_state_dict(state)


def _restore_counters(scheduler: Any, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(getattr(scheduler, name, None), Counter):
            state[name] = Counter(value)


def _check_state(scheduler: Any, state: Any) -> None:
    """Raise StateError for a state that would replace a method.

    Schedulers of torch set each item of a state as an attribute.
    """
    for name in state:
        own = inspect.getattr_static(type(scheduler), name, None)
        if callable(own) or isinstance(own, property) or name == "optimizer":
            raise StateError("A scheduler's state would replace one of its methods", actual=name)
