"""The coordinator of a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["SingleCoordinator"]


class SingleCoordinator:
    """A Coordinator with one rank."""

    rank = 0
    world_size = 1
    host: str | None = None

    def gather(self, payload: bytes, *, phase: str) -> list[bytes] | None:
        """See Coordinator.gather."""
        return [payload]

    def scatter(self, payloads: Sequence[bytes] | None, *, phase: str) -> bytes:
        """See Coordinator.scatter."""
        assert payloads is not None
        return payloads[0]

    def watch(self, work: Callable[[], None], *, phase: str) -> None:
        """See Coordinator.watch."""
        work()

    def progress(self, amount: int) -> None:
        """See Coordinator.progress."""
