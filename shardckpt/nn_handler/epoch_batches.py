"""The batches of an epoch, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

__all__ = ["EpochBatches"]


class EpochBatches:
    """The remaining batches of an epoch on this rank.

    `count` is their number if all ranks have as many, otherwise None. If the data fails between two
    agreements of the ranks, the other ranks do not know, and wait for this rank's part of each
    step. So it uses the batches of its last step again, until the ranks agree.

    Attributes:
        failure: The error of the data.
        repeats: The number of steps that used earlier batches.
    """

    def __init__(self, batches: Iterator[Any], *, per_step: int, count: int | None) -> None:
        self.failure: BaseException | None = None
        self.repeats = 0
        self.count = count
        self._batches = batches
        self._per_step = per_step
        self._used = 0
        self._last: list[Any] = []

    def for_step(self, *, agreed: bool) -> list[Any]:
        """Return the batches of the next step. `agreed`: the ranks agree before this step."""
        group: list[Any] = []
        if self.failure is None:
            try:
                group.extend(itertools.islice(self._batches, self._per_step))
            except BaseException as error:
                self.failure = error
        if self.failure is not None and not agreed and self.count is not None:
            missing = min(self._per_step, self.count - self._used) - len(group)
            group += (self._last * missing)[:missing]
            self.repeats += 1
        self._used += len(group)
        self._last = group or self._last
        return group
