"""When to save while training, under which name, and which checkpoints to keep.

Nothing here uses a file system, a clock or other ranks.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from shardckpt.errors import StateError
from shardckpt.manager.retention import KeepBest, KeepLast, Retention, check_mode

__all__ = ["SaveSchedule", "check_monitor", "checkpoint_name", "name_fields"]

_ADD_METRIC = (
    "add the metric: those that begin with val_ need a validation loader, and a name that you log "
    "is announced with handler.will_log.add(name)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSchedule:
    """When to save, and what to keep; see NNHandler.auto_save.

    Raises StateError for invalid or contradictory arguments.
    """

    interval: int | None = 1
    name: str = "epoch{epoch}"
    overwrite: bool = False
    every_steps: int | None = None
    every_minutes: float | None = None
    keep_last: int | None = None
    keep_best: int | None = None
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.interval is not None and (type(self.interval) is not int or self.interval < -1):
            raise StateError(
                "Invalid interval for saving",
                expected="a number of epochs, -1 for the last one, 0 or None for never",
                actual=repr(self.interval),
            )
        for what, types in (
            ("every_steps", (int,)),
            ("every_minutes", (int, float)),
            ("keep_last", (int,)),
            ("keep_best", (int,)),
        ):
            value = getattr(self, what)
            if value is not None and (type(value) not in types or not value > 0):
                raise StateError(
                    f"Invalid {what} for saving",
                    expected="None, or a number above 0",
                    actual=repr(value),
                )
        if self.keep_best is not None and self.monitor is None:
            raise StateError("keep_best needs a metric", remedy='pass monitor=, such as "val_loss"')
        check_mode(self.mode)
        if self.overwrite and (self.keep_last or self.keep_best):
            raise StateError(
                "overwrite=True keeps only the newest checkpoint",
                actual="keep_last or keep_best beside it",
                remedy="leave one of them out",
            )
        name_fields(self.name)

    def saves(self) -> bool:
        """Whether there are any saves, besides those on exceptions and signals."""
        return bool(self.interval or self.every_steps or self.every_minutes)

    def due_after_epoch(self, epoch: int, *, last: bool, save_last: bool = True) -> bool:
        """Whether to save after an epoch, counted from 1. `last`: training ends with it."""
        if not self.interval:
            return False
        return (last and (save_last or self.interval < 0)) or (
            self.interval > 0 and epoch % self.interval == 0
        )

    def due_at_step(self, step: int, *, saved_at: int) -> bool:
        """Whether to save after a step of the optimizer, counted from 1."""
        return bool(self.every_steps) and step != saved_at and step % (self.every_steps or 1) == 0

    def due_by_time(self, minutes: float) -> bool:
        """Whether to save this many minutes after the last save."""
        return self.every_minutes is not None and minutes >= self.every_minutes

    def policies(self) -> list[Retention]:
        """Return the retention policies, for a CheckpointManager."""
        kept: list[Retention] = []
        if self.overwrite or self.keep_last:
            kept.append(KeepLast(self.keep_last or 1))
        if self.keep_best:
            kept.append(KeepBest(self.keep_best, self.monitor or "", self.mode))
        return kept

    def check_names(self, known: set[str]) -> None:
        """Raise StateError if a field of the name, or the monitor, is not among the metrics."""
        for field in name_fields(self.name):
            if field not in known:
                raise _unknown(field, self.name, known)
        if self.monitor is not None:
            check_monitor(self.monitor, known)
        samples = {name: 1 if name in ("epoch", "step") else 0.5 for name in known}
        checkpoint_name(self.name, samples)  # raises for an invalid name before the first step

    def needs_validation(self) -> bool:
        """Whether a save after an epoch needs the metrics of validation."""
        names = {*name_fields(self.name), self.monitor or ""}
        return any(name.startswith("val_") for name in names)


def check_monitor(monitor: str, known: Set[str]) -> None:
    """Raise StateError for a metric that training never computes. `known` are its metrics."""
    if monitor not in known:
        raise StateError(
            "The monitored metric never appears",
            expected=f"one of {', '.join(sorted(known))}",
            actual=monitor,
            remedy=f"correct monitor, or {_ADD_METRIC}",
        )


def name_fields(template: str) -> list[str]:
    """Return the fields of a template for names. Raises StateError for a malformed template."""
    try:
        return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except (ValueError, TypeError) as error:
        raise _malformed(template, error) from error


def checkpoint_name(template: str, metrics: Mapping[str, Any]) -> str:
    """Return the template with metrics filled in, such as `epoch{epoch}_loss{val_loss:.4f}`.

    Raises StateError for an unknown metric, and for a name that leads out of the folder.
    """
    for field in name_fields(template):
        if field not in metrics:
            raise _unknown(field, template, set(metrics))
    clean = {
        key: value.replace("/", "_") if isinstance(value, str) else value
        for key, value in metrics.items()
    }
    try:
        name = template.format(**clean)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _malformed(template, error) from error
    if name.startswith(".") or not name or "/" in name or "\0" in name:
        raise StateError(
            "Invalid name of a checkpoint",
            expected="a name without / and NUL that does not begin with a dot",
            actual=repr(name),
        )
    return name


def _unknown(field: str, template: str, known: set[str]) -> StateError:
    return StateError(
        "The name of a checkpoint has an unknown field",
        expected=f"one of {', '.join(sorted(known))}",
        actual=f"{{{field}}} in {template!r}",
        remedy=f"correct the name, or {_ADD_METRIC}",
    )


def _malformed(template: str, error: Exception) -> StateError:
    return StateError(
        "The template for names of checkpoints is malformed",
        expected="text with fields as in {val_loss:.4f}",
        actual=f"{template!r}: {error}",
    )
