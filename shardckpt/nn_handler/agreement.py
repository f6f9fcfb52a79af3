"""The agreements of the ranks while they train, and the number of steps between two of them."""

from __future__ import annotations

import itertools
import time

import torch.distributed as dist

from shardckpt.nn_handler.parallel import largest
from shardckpt.torch_compat import group_store

__all__ = ["TrainingAgreement"]

_PERIOD_S, _LATE_S = 0.2, 0.5
_trainings = itertools.count()


class TrainingAgreement:
    """The exchanges of small numbers between the ranks of a training.

    The ranks agree before the first step of an epoch. The number of steps until they agree again
    starts at one, and doubles up to `most`, as long as so many of the slowest steps take less than
    0.2 seconds.

    Steps may become slow after that number is chosen. A rank that has not agreed for 0.5 seconds
    votes for an agreement, in the store of the process group. If all ranks have voted before a
    step, they agree before the next one.
    """

    def __init__(self, most: int) -> None:
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._most = most if self._ranks > 1 else 1
        self._distance, self._left = 0, 0  # in steps: between two agreements, to the next one
        self._slowest_s, self._began, self._agreed_at = 0.0, time.monotonic(), time.monotonic()
        self._name = f"shardckpt/agreement/{next(_trainings)}"
        self._number = 0  # of agreements; the same on all ranks
        self._votes: list[str] = []  # the keys of this rank's votes since the last agreement
        self._voted = False  # before the last step

    def due(self) -> bool:
        """Note that a step begins. Returns whether the ranks agree before it.

        The result is the same on all ranks.
        """
        now = time.monotonic()
        self._slowest_s = max(self._slowest_s, now - self._began)
        self._began = now
        self._left -= 1
        return self._left <= 0 or self._is_late(now)

    def _is_late(self, now: float) -> bool:
        """Whether all ranks voted before the last step. If not, vote if an agreement is late."""
        voted, self._voted = self._voted, now - self._agreed_at > _LATE_S and self._left > 1
        if not (voted or self._voted):
            return False
        group = dist.group.WORLD
        assert group is not None
        store = group_store(group)
        if voted:
            # The first rank that gets here decides for all: others may not have voted yet.
            vote = self._votes[-1]
            text = "all" if store.add(vote, 0) == self._ranks else "some"
            if store.compare_set(f"{vote}/verdict", "", text) == b"all":
                return True
        if self._voted:
            self._votes.append(f"{self._name}/{self._number}/{self._left}")
            store.add(self._votes[-1], 1)
        return False

    def largest(self, numbers: list[int]) -> list[int]:
        """Return the largest value of all ranks, for each of the numbers. Collective."""
        *found, slowest_us = largest([*numbers, int(self._slowest_s * 1e6)])
        fitting = int(_PERIOD_S * 1e6) // max(slowest_us, 1)
        self._distance = max(1, min(self._most, 2 * self._distance, fitting))
        self._left = self._distance
        self._slowest_s, self._began, self._agreed_at = 0.0, time.monotonic(), time.monotonic()
        self._number += 1
        self._forget_votes()
        return found

    def _forget_votes(self) -> None:
        """Remove the votes that rank 0 took part in. No rank reads them after an agreement."""
        if self._votes and dist.get_rank() == 0:
            group = dist.group.WORLD
            assert group is not None
            for vote in self._votes:
                group_store(group).delete_key(vote)
                group_store(group).delete_key(f"{vote}/verdict")
        self._votes, self._voted = [], False

    def soon(self) -> None:
        """Let the ranks agree before the next step. Called on all ranks."""
        self._distance, self._left = 0, 0
