"""Wait with a deadline, and the errors for ranks that are missing or do not respond."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from shardckpt.errors import RankFailedError, RankMismatchError

__all__ = ["SHORTEST_WAIT_S", "next_wait", "poll", "rank_failed", "ranks_disagree"]

SHORTEST_WAIT_S = 0.0002
_LONGEST_WAIT_S = 0.002
_LONGEST_WAIT_PER_RANK_S = 20e-6  # a store of torch answers about 100,000 requests a second


def next_wait(pause_s: float, *, ranks: int = 1) -> float:
    """Return the seconds of the next sleep after one of `pause_s`, if `ranks` ranks poll."""
    return min(pause_s * 1.5, max(_LONGEST_WAIT_S, ranks * _LONGEST_WAIT_PER_RANK_S))


def poll(ready: Callable[[], bool], deadline_s: float) -> bool:
    """Wait until ready or until the deadline. Returns whether it is ready."""
    pause, give_up_at = SHORTEST_WAIT_S, time.monotonic() + deadline_s
    while not ready():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(pause)
        pause = next_wait(pause)
    return True


def rank_failed(ranks: Iterable[int], phase: str, what: str) -> RankFailedError:
    """Return the error for ranks that died, do not respond or did not call."""
    failed = tuple(ranks)
    return RankFailedError(
        f"Rank {', '.join(map(str, failed))} failed in phase {phase!r}",
        rank=failed,
        phase=phase,
        expected="every rank to make this call, and to stay alive",
        actual=what,
        remedy="read the log of that rank; nothing was committed, and the next call may work",
    )


def ranks_disagree(rank: int, theirs: str, subject: str | None) -> RankMismatchError:
    """Return the error for a rank whose call differs from that of rank 0, which is `subject` if
    known.
    """
    return RankMismatchError(
        "The ranks make different calls, or pass different paths",
        rank=rank,
        expected=f"{subject}, as on rank 0" if subject else "the call of rank 0",
        actual=theirs,
        remedy="call the same function with the same path on every rank",
    )
