"""How often the ranks tell each other what they know while they train."""

from __future__ import annotations

import time

import torch.distributed as dist

from shardckpt.nn_handler.parallel import largest

__all__ = ["Agreement"]

_PERIOD_S = 0.2


class Agreement:
    """The exchanges of small numbers between the ranks of a training.

    The ranks agree before the first step of an epoch. The number of steps until they agree again
    starts at one, and doubles up to `most`, as long as so many of the slowest steps take less than
    0.2 seconds.
    """

    def __init__(self, most: int) -> None:
        self._most = most if dist.is_initialized() and dist.get_world_size() > 1 else 1
        self._distance, self._left = 0, 0  # in steps: between two agreements, to the next one
        self._slowest_s, self._began = 0.0, time.monotonic()

    def due(self) -> bool:
        """Note that a step begins; whether the ranks agree before it. The same on all ranks."""
        now = time.monotonic()
        self._slowest_s = max(self._slowest_s, now - self._began)
        self._began = now
        self._left -= 1
        return self._left <= 0

    def largest(self, numbers: list[int]) -> list[int]:
        """The largest value of all ranks, for each of the numbers. Collective."""
        *found, slowest_us = largest([*numbers, int(self._slowest_s * 1e6)])
        fitting = int(_PERIOD_S * 1e6) // max(slowest_us, 1)
        self._distance = max(1, min(self._most, 2 * self._distance, fitting))
        self._left = self._distance
        self._slowest_s, self._began = 0.0, time.monotonic()
        return found

    def soon(self) -> None:
        """Let the ranks agree before the next step. Called on all ranks."""
        self._distance, self._left = 0, 0
