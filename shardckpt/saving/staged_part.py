"""The part of a state that one rank writes, staged alone.

If several ranks hold the same tensors, as under DDP and HSDP, each of them writes a part. For
async_save the ranks divide the work before they stage, so that a rank copies only its part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardckpt.config import options
from shardckpt.coordination.resolve import Operation
from shardckpt.errors import ShardckptError, StateError
from shardckpt.logs import logger
from shardckpt.plan.local_plan import ChunkTable, LocalPlan
from shardckpt.plan.save_plan import RankWrites
from shardckpt.reports import Stopwatch
from shardckpt.saving.agreement import Division, divide
from shardckpt.state.local_chunks import box_slices

__all__ = ["Divider", "StagedPart", "part_of", "planned_data"]

_LIMIT_S = 1.0
"""The next step of the optimizer waits for the staging, so the ranks may not take longer."""

_LEAST_BYTES = 1 << 20
"""It takes less time to copy fewer bytes than to divide them."""

_MOST_FAILED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPart:
    """The elements of the chunks that this rank writes.

    Attributes:
        writes: The chunks.
        data: The elements of each chunk.
        replicas: The result of replica_digests for all of this rank's chunks.
    """

    writes: RankWrites
    data: Sequence[torch.Tensor]
    replicas: bytes

    def check(self, writes: RankWrites) -> None:
        """Raise StateError if the part does not consist of the chunks `writes`."""
        own = self.writes
        if (
            not np.array_equal(own.row, writes.row)
            or not np.array_equal(own.boxes, writes.boxes)
            or own.files != writes.files
        ):
            raise StateError(
                "The ranks divided the save anew after this rank had staged its part",
                expected=f"{len(own.row)} chunks, as staged",
                actual=f"{len(writes.row)} chunks, or other ones",
                remedy="save again",
            )


class Divider:
    """Divides the work before the stagings of a process, one after another.

    After n failed divisions in a row, only every 2**(n - 1)th save tries it: ranks that count other
    failures still try it at the same saves.
    """

    def __init__(self) -> None:
        self._saves = self._failed = 0

    def divide(self, ranks: Operation | None, plan: LocalPlan) -> Division | None:
        """Divide the work among the ranks. Collective.

        Args:
            ranks: The ranks. None if they can't divide the work now.
            plan: This rank's plan.

        Returns:
            This rank's part. None if other ranks hold little of its data, or if a rank does not
            answer within a second: this rank then stages all its data, and the save goes on.
        """
        if ranks is None or ranks.world_size == 1:
            return None
        self._saves += 1
        rows = zip(plan.data, plan.shared, strict=True)
        if sum(data.nbytes for data, shared in rows if shared) < _LEAST_BYTES:
            return None
        if self._failed and self._saves % 2 ** (self._failed - 1):
            return None
        limits = dict.fromkeys(("arrival_deadline_s", "deadline_s", "stall_deadline_s"), _LIMIT_S)
        try:
            with options(**limits), ranks as coordinator:
                division = divide(coordinator, plan, Stopwatch())
        except ShardckptError as error:  # the save meets it again, and raises it
            logger.debug("stage all data of rank %d: %s", ranks.rank, error)
            self._failed = min(self._failed + 1, _MOST_FAILED)
            return None
        self._failed = 0
        return division


def part_of(plan: LocalPlan, writes: RankWrites) -> LocalPlan:
    """Return a plan of the chunks that this rank writes, in their order."""
    return dataclasses.replace(
        plan,
        chunks=ChunkTable(tensor=plan.chunks.tensor[writes.row], boxes=writes.boxes),
        shared=plan.shared[writes.row],
        data=tuple(planned_data(plan, writes)),
    )


def planned_data(local: LocalPlan, writes: RankWrites) -> list[torch.Tensor]:
    """Return the data of each write: a local chunk, or the part of it that this rank writes."""
    held = local.chunks.boxes
    data = [local.data[row] for row in writes.row.tolist()]
    differs = (held[writes.row] != writes.boxes[:, :, : held.shape[2]]).any(axis=(1, 2))
    for index in np.flatnonzero(differs).tolist():
        dims = data[index].dim()
        begin = held[writes.row[index], 0, :dims].tolist()
        offsets, sizes = writes.boxes[index, :, :dims].tolist()
        data[index] = data[index][box_slices(begin, offsets, sizes)]
    return data
