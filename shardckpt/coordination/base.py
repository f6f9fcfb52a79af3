"""The ranks of one operation, and how they reach each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["Coordinator", "WorkBroken"]


class WorkBroken(Exception):
    """Work that ranks do together has raised on another one, whose own error says why."""


class Coordinator(Protocol):
    """The ranks of one operation. Every wait has a deadline; past it, RankFailedError.

    `gather` and `scatter` are collective and called in turn.
    """

    rank: int
    world_size: int

    def gather(self, payload: bytes, *, phase: str) -> list[bytes] | None:
        """Everyone's payload in rank order, on rank 0; None elsewhere."""

    def scatter(self, payloads: Sequence[bytes] | None, *, phase: str) -> bytes:
        """This rank's of the payloads that rank 0 hands over."""

    def watch(self, work: Callable[[], None], *, phase: str) -> None:
        """Do work that waits for other ranks in a way of its own, such as torch's collectives.

        Collective. Raises RankFailedError as soon as a rank is silent, and WorkBroken as soon as
        the work has raised on another rank; the work itself then goes on in a thread that is left
        behind. What the work raises is raised. The work calls `progress`; StalledError if it has
        not done so for too long.
        """

    def progress(self, amount: int) -> None:
        """This rank is alive and gets on; called often, from its working threads."""
