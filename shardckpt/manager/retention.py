"""Which checkpoints of a job stay: policies, pure functions of what has been saved."""

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
    "ranked",
    "to_remove",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint of a CheckpointManager: `saved_at` in seconds since 1970, by rank 0's clock."""

    path: str
    step: int
    metrics: Mapping[str, float]
    saved_at: float


Retention = Callable[[Sequence[SavedCheckpoint]], Iterable[SavedCheckpoint]]
"""A policy: of the intact checkpoints, oldest first, those that it wants to keep."""


def to_remove(
    saved: Sequence[SavedCheckpoint], policies: Iterable[Retention]
) -> list[SavedCheckpoint]:
    """What no policy keeps, oldest first. The newest always stays; no policy at all keeps all."""
    policies = list(policies)
    if not policies or not saved:
        return []
    kept = {saved[-1].path}
    for policy in policies:
        kept.update(checkpoint.path for checkpoint in policy(saved))
    return [checkpoint for checkpoint in saved if checkpoint.path not in kept]


def ranked(
    saved: Iterable[SavedCheckpoint], metric: str, mode: Literal["min", "max"]
) -> list[SavedCheckpoint]:
    """Those that have a metric, best first; of equals the newest; NaN counts as absent."""
    known = [c for c in saved if not math.isnan(c.metrics.get(metric, math.nan))]
    sign = 1 if mode == "min" else -1
    return sorted(known, key=lambda c: (sign * c.metrics[metric], -c.step, -c.saved_at))


def _check_count(value: object, what: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise StateError(
            f"A retention policy was given a bad {what}",
            expected="a number above 0",
            actual=repr(value),
        )


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest `count`."""

    count: int

    def __post_init__(self) -> None:
        _check_count(self.count, "count")

    def __call__(self, saved: Sequence[SavedCheckpoint]) -> Iterable[SavedCheckpoint]:
        """Those to keep."""
        return saved[-self.count :]


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the best `count` by a metric; `mode` says which is better, "min" or "max"."""

    count: int
    metric: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        _check_count(self.count, "count")
        if self.mode not in ("min", "max"):
            raise StateError(
                "Unknown value for mode", expected='"min" or "max"', actual=repr(self.mode)
            )

    def __call__(self, saved: Sequence[SavedCheckpoint]) -> Iterable[SavedCheckpoint]:
        """Those to keep."""
        return ranked(saved, self.metric, self.mode)[: self.count]


@dataclass(frozen=True, slots=True)
class KeepEverySteps:
    """Keep those whose step is a multiple of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        _check_count(self.steps, "number of steps")

    def __call__(self, saved: Sequence[SavedCheckpoint]) -> Iterable[SavedCheckpoint]:
        """Those to keep."""
        return [checkpoint for checkpoint in saved if checkpoint.step % self.steps == 0]


@dataclass(frozen=True, slots=True)
class KeepEveryHours:
    """Keep the first, and then the first that is at least `hours` younger than the one kept
    before."""

    hours: float

    def __post_init__(self) -> None:
        _check_count(self.hours, "number of hours")

    def __call__(self, saved: Sequence[SavedCheckpoint]) -> Iterable[SavedCheckpoint]:
        """Those to keep."""
        kept: list[SavedCheckpoint] = []
        for checkpoint in saved:
            if not kept or checkpoint.saved_at - kept[-1].saved_at >= self.hours * 3600:
                kept.append(checkpoint)
        return kept
