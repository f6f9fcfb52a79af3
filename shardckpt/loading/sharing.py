"""Blocks that one rank reads and sends to the others, over a group of torch.distributed of its own.

The group uses gloo, as the blocks are in CPU memory, also if the training uses NCCL. It is made for
one load, and is not used by anything else. Gloo has no reliable way to end a transfer early. So a
rank that fails goes on to receive and send, until all ranks have ended.
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
from shardckpt.coordination.base import WorkBroken
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.plan.read_plan import WINDOW_BYTES
from shardckpt.plan.shared_reads import Unit

__all__ = ["Sharing", "TransferError", "can_share"]

_WINDOW_BLOCKS = WINDOW_BYTES // BLOCK_BYTES
_NEVER_SENT = 1 << 30  # no unit has this tag


class TransferError(Exception):
    """A block was not sent or received: a rank has failed, or the network between two ranks."""


def can_share(group: Any) -> bool:
    """Whether the ranks of a process group can send each other blocks."""
    return group is not None and bool(dist.is_gloo_available())


class Sharing:
    """The units that this rank reads for others or gets from them, and their transfers.

    Args:
        group: The process group of the ranks that load.
        identity: A text that no other load has, the same on all ranks.
        rank: This rank.
        units: All units.

    Attributes:
        rank: This rank.
        received_bytes: The bytes that this rank has received.
    """

    def __init__(self, group: Any, identity: str, rank: int, units: Sequence[Unit]) -> None:
        self.rank = rank
        self.received_bytes = 0
        self._lock = threading.Lock()
        self._group = group
        self._identity = identity
        self._links: Any = None
        self._error: BaseException | None = None
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

    def connect(self) -> None:
        """Connect the ranks. Collective.

        The connections are closed with this object. No rank may drop it before all have ended
        their transfers, as bytes may still be on their way.
        """
        from torch.distributed.distributed_c10d import PrefixStore  # some builds lack it

        try:
            self._links = dist.ProcessGroupGloo(
                PrefixStore(
                    f"shardckpt/blocks/{self._identity}", self._group.get_group_store().clone()
                ),
                self.rank,
                dist.get_world_size(self._group),
                datetime.timedelta(seconds=current().stall_deadline_s),
            )
        except (RuntimeError, ValueError, dist.DistError) as error:
            raise TransferError(_first_line(error)) from error

    @property
    def failed(self) -> bool:
        """Whether this rank has noted an error."""
        return self._error is not None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note an error of the with block, see `note`."""
        try:
            yield
        except Exception as error:
            self.note(error)

    def note(self, error: BaseException) -> None:
        """Note an error for `check`. The first one that has a reason on this rank counts."""
        with self._lock:
            if self._error is None or isinstance(self._error, TransferError | WorkBroken):
                self._error = error

    def check(self) -> None:
        """Raise the error that this rank has noted, if there is one."""
        if self._error is not None:
            raise self._error

    def receive(self, unit: Unit, view: memoryview) -> None:
        """Fill a view with the blocks of a unit that another rank reads.

        Raises:
            TransferError: They do not arrive.
        """
        source = unit.source(self.rank)
        try:
            self._links.recv([_tensor(view)], source, unit.tag).wait()
        except (RuntimeError, dist.DistError) as error:
            raise TransferError(f"rank {source}: {_first_line(error)}") from error
        with self._lock:
            self.received_bytes += len(view)

    def send(self, unit: Unit, view: memoryview) -> list[Any]:
        """Begin to send the blocks of a unit on. They may change after `finish`."""
        try:
            targets = unit.targets(self.rank)
            return [self._links.send([_tensor(view)], rank, unit.tag) for rank in targets]
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
        """End the transfers of this rank with an error, as far as that works. Returns at once.

        A receive that ends at its deadline closes the connections of the group. Without it the
        transfers end at their deadline.
        """
        if self._links is not None:
            threading.Thread(target=self._close_links, daemon=True, name="shardckpt-abort").start()

    def _close_links(self) -> None:
        empty = torch.empty(1, dtype=torch.uint8, device="cpu")
        soon = datetime.timedelta(milliseconds=1)
        for other in range(self._links.size()):  # one that is closed already closes no other
            with suppress(Exception):
                self._links.recv([empty], other, _NEVER_SENT).wait(soon)


def _tensor(view: memoryview) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
