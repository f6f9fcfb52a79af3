"""What can't be saved, told all at once."""

from __future__ import annotations

from collections.abc import Sequence

from shardckpt.errors import StateError

__all__ = ["all_refused"]

_LISTED = 100


def all_refused(errors: Sequence[StateError]) -> StateError:
    """One error for all entries that were refused: the first one's, and a line for each other."""
    first, *others = errors
    if not others:
        return first
    lines = [f"{error.tensor}: {error.actual}" for error in others[:_LISTED]]
    if len(others) > _LISTED:
        lines.append(f"and {len(others) - _LISTED} more")
    return type(first)(
        "\n    ".join([f"{first.message}; {len(others)} more can't be saved either:", *lines]),
        tensor=first.tensor,
        expected=first.expected,
        actual=first.actual,
        remedy=first.remedy,
    )
