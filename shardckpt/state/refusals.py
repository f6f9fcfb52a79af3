"""One error for all entries that can't be saved."""

from __future__ import annotations

from collections.abc import Sequence

from shardckpt.errors import StateError

__all__ = ["all_refused"]

_NAMED = 20


def all_refused(errors: Sequence[StateError]) -> StateError:
    """Return one error for several: that of the first entry, with a line for each entry."""
    first = errors[0]
    if len(errors) == 1:
        return first
    lines = [f"{error.tensor}: {error.actual}: {error.remedy}" for error in errors[:_NAMED]]
    if len(errors) > _NAMED:
        lines.append(f"and {len(errors) - _NAMED} more")
    head = f"{first.message}; {len(errors)} entries of the state can't be saved:"
    return type(first)(
        "\n    ".join([head, *lines]),
        tensor=first.tensor,
        expected=first.expected,
        actual=first.actual,
        remedy=first.remedy,
    )
