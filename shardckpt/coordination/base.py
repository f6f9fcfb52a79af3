"""The interface of the ranks of an operation: gather, scatter, watch, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["Coordinator", "WorkBroken"]


class WorkBroken(Exception):
    """The collective work of the ranks raised an error on another rank. The error of that rank has
    the reason."""


class Coordinator(Protocol):
    """The ranks of one operation. Every wait has a deadline, after which it raises RankFailedError.

    `gather` and `scatter` are collective, and called alternately.

    Attributes:
        rank: This rank.
        world_size: The number of ranks.
        host: A host that all ranks reach, such as that of the store. None if none is known.
    """

    rank: int
    world_size: int
    host: str | None

    def gather(self, payload: bytes, *, phase: str) -> list[bytes] | None:
        """Collect the payloads of all ranks on rank 0, in rank order. None on other ranks."""

    def scatter(self, payloads: Sequence[bytes] | None, *, phase: str) -> bytes:
        """Send each rank its payload, from rank 0. Other ranks pass None."""

    def watch(self, work: Callable[[], None], *, phase: str) -> None:
        """Run work that waits for other ranks by its own means, such as collectives of torch.
        Collective.

        Raises RankFailedError as soon as a rank stops responding, and WorkBroken as soon as the
        work raised an error on another rank; the work then continues in a thread that is abandoned.
        Raises the errors of the work itself. The work must call `progress` regularly, otherwise
        StalledError is raised.
        """

    def progress(self, amount: int) -> None:
        """Report that this rank makes progress. Called often, from its working threads."""
