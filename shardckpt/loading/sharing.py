"""Blocks that one rank reads and sends to the others, over a group of torch.distributed of its own.

The group uses gloo, as the blocks are in CPU memory, also if the training uses NCCL. It is made for
one load, and is not used by anything else.
"""

from __future__ import annotations

import datetime
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from shardckpt.config import current
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.plan.read_plan import WINDOW_BYTES
from shardckpt.plan.shared_reads import Unit

__all__ = ["Sharing", "TransferError", "can_share"]

_WINDOW_BLOCKS = WINDOW_BYTES // BLOCK_BYTES


class TransferError(Exception):
    """A block was not sent or received: a rank has failed, or the network between two ranks."""


def can_share(group: Any) -> bool:
    """Whether the ranks of a process group can send each other blocks."""
    return group is not None and dist.is_gloo_available()


class Sharing:
    """The units that this rank reads for others or gets from them, and their transfers.

    Attributes:
        received_bytes: The bytes that this rank has received.
    """

    def __init__(self, group: Any, rank: int, units: Sequence[Unit]) -> None:
        self.rank = rank
        self.received_bytes = 0
        self._lock = threading.Lock()
        self._ranks = dist.get_process_group_ranks(group)
        self._group: Any = None
        self._units: dict[tuple[int, int], list[Unit]] = defaultdict(list)
        for unit in units:
            if rank in unit.path:
                self._units[unit.shard, unit.first // _WINDOW_BLOCKS].append(unit)

    def windows(self) -> Sequence[tuple[int, int]]:
        """The shard and number of each window that has units of this rank."""
        return list(self._units)

    def units(self, shard: int, window: int) -> Sequence[Unit]:
        """The units of a window, in the same order on all ranks."""
        return self._units.get((shard, window), ())

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connect the ranks for the with block. Collective."""
        try:
            self._group = dist.new_group(
                self._ranks,
                timeout=datetime.timedelta(seconds=current().stall_deadline_s),
                backend="gloo",
                use_local_synchronization=True,
                sort_ranks=False,
                group_desc="shardckpt_reads",
            )
        except (RuntimeError, ValueError, dist.DistError) as error:
            raise TransferError(_first_line(error)) from error
        yield
        dist.destroy_process_group(self._group)

    def receive(self, unit: Unit, view: memoryview) -> bool:
        """Fill a view with the blocks of a unit, if another rank reads them.

        Returns:
            False if this rank reads them.

        Raises:
            TransferError: They do not arrive.
        """
        source = unit.source(self.rank)
        if source is None:
            return False
        try:
            self._group.recv([_tensor(view)], source, unit.tag).wait()
        except (RuntimeError, dist.DistError) as error:
            raise TransferError(f"rank {source}: {_first_line(error)}") from error
        with self._lock:
            self.received_bytes += len(view)
        return True

    def send(self, unit: Unit, view: memoryview) -> list[Any]:
        """Begin to send the blocks of a unit on. They may change after `finish`."""
        try:
            targets = unit.targets(self.rank)
            return [self._group.send([_tensor(view)], rank, unit.tag) for rank in targets]
        except (RuntimeError, dist.DistError) as error:
            raise TransferError(_first_line(error)) from error

    def finish(self, sends: Sequence[Any]) -> None:
        """Wait until blocks are sent.

        Raises:
            TransferError: They are not sent.
        """
        try:
            for send in sends:
                send.wait()
        except (RuntimeError, dist.DistError) as error:
            raise TransferError(_first_line(error)) from error

    def abort(self) -> None:
        """End all transfers of this rank with an error, here and on the other ranks. Never raises.

        A receive that ends at its deadline closes the connections of the group.
        """
        if self._group is None:
            return
        with suppress(Exception):
            empty = torch.empty(1, dtype=torch.uint8, device="cpu")
            other = (self.rank + 1) % len(self._ranks)
            self._group.recv([empty], other, 1 << 30).wait(datetime.timedelta(milliseconds=1))


def _tensor(view: memoryview) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
