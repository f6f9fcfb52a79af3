"""Retention policies, which choose the checkpoints of a job that are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shardckpt.errors import StateError

__all__ = [
    "KeepBest",
    "KeepEveryHours",
    "KeepEverySteps",
    "KeepLast",
    "Retention",
    "SavedCheckpoint",
    "check_mode",
    "ranked",
    "to_remove",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint of a CheckpointManager.

    Attributes:
        path: Its directory.
        step: The step that was passed to `save`.
        metrics: The metrics that were passed to `save`.
        saved_at: The time of the save by rank 0's clock, in seconds since 1970.

    Example:
        >>> import torch, shardckpt
        >>> manager = shardckpt.CheckpointManager("run")
        >>> manager.save(7, {"weight": torch.ones(3)}, metrics={"loss": 0.5}).metrics["loss"]
        0.5
    """

    path: str
    step: int
    metrics: Mapping[str, float]
    saved_at: float


Retention = Callable[[Sequence[SavedCheckpoint]], Iterable[SavedCheckpoint]]
"""A retention policy takes the intact checkpoints, oldest first, and returns those to keep."""


def to_remove(
    saved: Sequence[SavedCheckpoint], policies: Iterable[Retention]
) -> list[SavedCheckpoint]:
    """Return the checkpoints that no policy keeps, oldest first.

    The newest checkpoint is always kept. Without policies, all are kept.
    """
    policies = list(policies)
    if not policies or not saved:
        return []
    kept = {saved[-1].path}
    for policy in policies:
        kept.update(checkpoint.path for checkpoint in policy(saved))
    return [checkpoint for checkpoint in saved if checkpoint.path not in kept]


def ranked(
    saved: Iterable[SavedCheckpoint], monitor: str, mode: Literal["min", "max"]
) -> list[SavedCheckpoint]:
    """Sort the checkpoints that have the metric `monitor`, best first.

    The newest of several equal checkpoints comes first. A metric that is NaN counts as missing.
    """
    known = [c for c in saved if not math.isnan(c.metrics.get(monitor, math.nan))]
    sign = 1 if mode == "min" else -1
    return sorted(known, key=lambda c: (sign * c.metrics[monitor], -c.step, -c.saved_at))


def check_mode(mode: object) -> None:
    """Raise StateError for a mode other than "min" and "max"."""
    if mode not in ("min", "max"):
        raise StateError("Invalid value for mode", expected='"min" or "max"', actual=repr(mode))


def _check_positive(value: object, what: str, types: tuple[type, ...] = (int,)) -> None:
    if not isinstance(value, types) or isinstance(value, bool) or not value > 0:  # type: ignore[operator]
        raise StateError(
            f"Invalid {what} for a retention policy",
            expected=f"{'a number' if float in types else 'an integer'} above 0",
            actual=repr(value),
        )


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keeps the newest checkpoints.

    Args:
        count: How many to keep.

    Raises:
        StateError: `count` is not an integer above 0.

    Example:
        >>> import shardckpt
        >>> manager = shardckpt.CheckpointManager("run", keep=[shardckpt.KeepLast(3)])
    """

    count: int

    def __post_init__(self) -> None:
        _check_positive(self.count, "count")

    def __call__(self, saved: Sequence[SavedCheckpoint]) -> Iterable[SavedCheckpoint]:
        """Return the checkpoints to keep."""
        return saved[-self.count :]


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keeps the best checkpoints by a metric.

    Args:
        count: How many to keep.
        monitor: The name of the metric. Checkpoints without it are not kept by this policy. If no
            checkpoint has it, but some have other metrics, the manager warns.
        mode: Whether "min" or "max" is best.

    Raises:
        StateError: `count` is not an integer above 0, or `mode` is invalid.

    Example:
        >>> import shardckpt
        >>> keep = [shardckpt.KeepBest(1, "accuracy", mode="max")]
        >>> manager = shardckpt.CheckpointManager("run", keep=keep)
    """

    count: int
    monitor: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        _check_positive(self.count, "count")
        check_mode(self.mode)

    def __call__(self, saved: Sequence[SavedCheckpoint]) -> Iterable[SavedCheckpoint]:
        """Return the checkpoints to keep."""
        return ranked(saved, self.monitor, self.mode)[: self.count]


@dataclass(frozen=True, slots=True)
class KeepEverySteps:
    """Keeps the checkpoints whose step is a multiple of `steps`.

    Args:
        steps: The interval in steps.

    Raises:
        StateError: `steps` is not an integer above 0.

    Example:
        >>> import shardckpt
        >>> manager = shardckpt.CheckpointManager("run", keep=[shardckpt.KeepEverySteps(1000)])
    """

    steps: int

    def __post_init__(self) -> None:
        _check_positive(self.steps, "number of steps")

    def __call__(self, saved: Sequence[SavedCheckpoint]) -> Iterable[SavedCheckpoint]:
        """Return the checkpoints to keep."""
        return [checkpoint for checkpoint in saved if checkpoint.step % self.steps == 0]


@dataclass(frozen=True, slots=True)
class KeepEveryHours:
    """Keeps the first checkpoint, and then one at least `hours` after the last that was kept.

    Args:
        hours: The interval in hours.

    Raises:
        StateError: `hours` is not above 0.

    Example:
        >>> import shardckpt
        >>> manager = shardckpt.CheckpointManager("run", keep=[shardckpt.KeepEveryHours(6)])
    """

    hours: float

    def __post_init__(self) -> None:
        _check_positive(self.hours, "number of hours", (int, float))

    def __call__(self, saved: Sequence[SavedCheckpoint]) -> Iterable[SavedCheckpoint]:
        """Return the checkpoints to keep."""
        kept: list[SavedCheckpoint] = []
        for checkpoint in saved:
            if not kept or checkpoint.saved_at - kept[-1].saved_at >= self.hours * 3600:
                kept.append(checkpoint)
        return kept
