"""Heartbeats between the ranks of an operation, for all coordinators.

Every rank sends a number that grows while the rank lives, and its progress. A rank that waits for
others checks both: a rank without heartbeats has failed, and a rank with heartbeats but without
progress has stalled.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from typing import NoReturn

from shardckpt.config import current
from shardckpt.coordination.deadlines import SHORTEST_WAIT_S, next_wait, rank_failed

__all__ = ["HeartbeatCoordinator", "beat_interval_s"]


def beat_interval_s() -> float:
    """Return the interval between heartbeats in seconds."""
    return min(current().deadline_s / 5, 1.0)


class HeartbeatCoordinator(ABC):
    """A Coordinator whose ranks watch each other. Subclasses transmit the messages."""

    host: str | None = None

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._progress = 0
        self._seen: dict[int, tuple[int, float, int, float]] = {}
        self._stopped = threading.Event()
        self._pulse = threading.Thread(
            target=copy_context().run, args=(self._keep_beating,), daemon=True
        )

    def progress(self, amount: int) -> None:
        """See Coordinator.progress."""
        self._progress += 1

    @abstractmethod
    def _beat_until_stopped(self) -> None:
        """Send heartbeats until `_stopped` is set. Runs in its own thread."""

    @abstractmethod
    def _signs(self, ranks: Sequence[int]) -> list[tuple[int, int]]:
        """Return the latest (beat, progress) of each rank, (0, 0) before the first."""

    @abstractmethod
    def _given_up(self) -> list[int]:
        """Return the ranks that rank 0 has given up. Called on other ranks."""

    @abstractmethod
    def _give_up(self, ranks: list[int]) -> None:
        """Record that ranks are lost. Rank 0 also informs the other ranks."""

    def _keep_beating(self) -> None:
        with suppress(Exception):  # the waiting thread detects the error itself
            self._beat_until_stopped()

    def _wait(
        self, phase: str, ready: Callable[[], bool], missing: Callable[[], list[int]]
    ) -> None:
        """Wait until ready, and watch the missing ranks meanwhile.

        Raises RankFailedError for missing ranks that do not respond, that stalled, or that rank 0
        has given up.
        """
        begun, pause_s = time.monotonic(), SHORTEST_WAIT_S
        look_at = begun + beat_interval_s()
        while not ready():
            self._progress += 1  # waiting has its own deadline and does not count as a stall
            if time.monotonic() >= look_at:
                self._check(missing(), phase, begun)
                look_at = time.monotonic() + beat_interval_s()
            time.sleep(pause_s)
            pause_s = next_wait(pause_s, ranks=self.world_size)

    def _check(self, ranks: list[int], phase: str, begun: float) -> None:
        if self.rank and (lost := self._given_up()):
            self._fail(lost, phase, "rank 0 has given them up")
        now, options = time.monotonic(), current()
        silent_s: dict[int, float] = {}
        stalled_s: dict[int, float] = {}
        for rank, (beat, progress) in zip(ranks, self._signs(ranks), strict=True):
            last, alive_at, amount, moved_at = self._seen.get(rank, (0, begun, 0, begun))
            alive_at = max(begun, alive_at) if beat == last else now
            moved_at = max(begun, moved_at) if progress == amount else now
            self._seen[rank] = beat, alive_at, progress, moved_at
            silent_s[rank], stalled_s[rank] = now - alive_at, now - moved_at
        if silent := _overdue(silent_s, options.deadline_s):
            what = f"no sign of life for about {options.deadline_s:g} s: dead, stopped or cut off"
            self._fail(silent, phase, what)
        if stalled := _overdue(stalled_s, options.stall_deadline_s):
            what = f"alive, but no progress for about {options.stall_deadline_s:g} s"
            self._fail(stalled, phase, what)

    def _fail(self, ranks: list[int], phase: str, what: str) -> NoReturn:
        self._give_up(ranks)
        raise rank_failed(ranks, phase, what)


def _overdue(waited_s: dict[int, float], deadline_s: float) -> list[int]:
    """Return the ranks that have failed, once a rank has passed the deadline.

    The last signs of ranks that fail at one moment, as on a host that dies, are up to an interval
    apart, and are seen up to an interval later.
    """
    if max(waited_s.values(), default=0.0) <= deadline_s:
        return []
    least_s = deadline_s - 2 * beat_interval_s()
    return [rank for rank, waited in waited_s.items() if waited > least_s]
