"""When a training run saves itself, under which name, and what becomes of the save before."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from typing import Any

from shardckpt.errors import StateError

__all__ = ["AutoSaver", "checkpoint_name"]


def checkpoint_name(template: str, metrics: Mapping[str, Any]) -> str:
    """The template with metrics filled in, such as `epoch{epoch}_loss{val_loss:.4f}`.

    Raises StateError for a metric that is not there, and where the name would leave its folder.
    """
    try:
        fields = [
            field for _, field, _, _ in string.Formatter().parse(template) if field is not None
        ]
    except ValueError as error:
        raise _bad_template(template, error) from error
    for field in fields:
        if field not in metrics:
            raise StateError(
                "The name of a checkpoint asks for a metric that is not there",
                expected=f"one of {', '.join(sorted(metrics))}",
                actual=f"{{{field}}} in {template!r}",
                remedy="correct the name, or add the metric; val_ ones need a validation loader",
            )
    clean = {
        key: value.replace("/", "_") if isinstance(value, str) else value
        for key, value in metrics.items()
    }
    try:
        name = template.format(**clean)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _bad_template(template, error) from error
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise StateError(
            "This is no name for a checkpoint", actual=repr(name), remedy="leave out / and NUL"
        )
    return name


def _bad_template(template: str, error: Exception) -> StateError:
    return StateError(
        "The template for names of checkpoints is malformed",
        expected="text with fields as in {val_loss:.4f}",
        actual=f"{template!r}: {error}",
    )


class AutoSaver:
    """Saves every `interval` epochs (-1: the last one alone; 0 or None: never).

    `overwrite` keeps only the newest of its own saves: the one before is removed once the new
    one is whole.
    """

    def __init__(
        self, *, interval: int | None, save_path: str | os.PathLike[str], name: str, overwrite: bool
    ) -> None:
        if interval is not None and (not isinstance(interval, int) or interval < -1):
            raise StateError(
                "This is no interval for saving",
                expected="a number of epochs, -1 for the last one, 0 or None for never",
                actual=repr(interval),
            )
        self.interval = interval or 0
        self.save_path = os.fspath(save_path)
        self.name = name
        self.overwrite = overwrite
        self.last: str | None = None

    def due(self, *, epoch: int, last: bool) -> bool:
        """Whether to save after an epoch (counted from 1)."""
        return last if self.interval < 0 else bool(self.interval) and epoch % self.interval == 0

    def target(self, metrics: Mapping[str, Any]) -> str:
        """The path of a save with these metrics."""
        return os.path.join(self.save_path, checkpoint_name(self.name, metrics))

    def saved(self, path: str) -> str | None:
        """Note a save that is whole; the path of the one to remove, if any."""
        before, self.last = self.last, path
        return before if self.overwrite and before not in (None, path) else None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> AutoSaver:
        """The saver that a state_dict is of."""
        last = state.pop("last")
        saver = cls(**state)
        saver.last = last
        return saver
