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
    """Convert Python's built-in exceptions to StateError while an object's state_dict runs.

    Other exceptions are raised unchanged, as the program may expect its own.
    """
    with _builtin_errors(
        "An object can't give its state",
        at=at,
        expected=f"a state from {type(value).__qualname__}.state_dict()",
        remedy="correct the cause on every rank, then try again",
    ):
        yield


@contextmanager
def setting_state(value: Any, *, at: str) -> Iterator[None]:
    """Convert exceptions like reading_state, while load_state_dict or set_state runs."""
    with _builtin_errors(
        "An object refused its saved state. Tensors and other entries may have been replaced",
        at=at,
        expected=f"a state that {type(value).__qualname__} accepts",
        remedy="create the object as it was when it was saved, or leave it out of the state",
    ):
        yield


@contextmanager
def _builtin_errors(message: str, *, at: str, expected: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error).__module__ != "builtins":
            raise
        raise StateError(
            message,
            tensor=at,
            expected=expected,
            actual=f"{type(error).__name__}: {error}",
            remedy=remedy,
        ) from error
