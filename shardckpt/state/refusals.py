"""The errors of states that can't be saved or loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shardckpt.errors import StateError

__all__ = ["all_refused", "reading_state", "setting_state"]

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


@contextmanager
def reading_state(value: Any, *, at: str) -> Iterator[None]:
    """While state_dict of the object at a name runs: turn Python's own exceptions into StateError.

    Exceptions of other classes are those of the program, which may wait for them.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__ != "builtins":
            raise
        raise StateError(
            "An object can't give its state",
            tensor=at,
            expected=f"a state from {type(value).__qualname__}.state_dict()",
            actual=f"{type(error).__name__}: {error}",
            remedy="do what its own message asks for, on every rank, then try again",
        ) from error


@contextmanager
def setting_state(value: Any, *, at: str) -> Iterator[None]:
    """As reading_state, while load_state_dict or set_state of the object runs."""
    try:
        yield
    except Exception as error:
        if type(error).__module__ != "builtins":
            raise
        raise StateError(
            "An object refused its saved state. Tensors and other entries may have been replaced",
            tensor=at,
            expected=f"a state that {type(value).__qualname__} takes",
            actual=f"{type(error).__name__}: {error}",
            remedy="create it as the one that was saved, or leave it out of the state",
        ) from error
