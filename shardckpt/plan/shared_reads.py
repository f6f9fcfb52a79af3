"""The division of reads of the same blocks: one rank reads them, and sends them to the others.

Pure functions. Each rank describes the blocks that it needs (NeededBlocks). Rank 0 finds the
segments that one rank should read for others. All ranks divide the segments into the same units,
and choose the same rank to read each unit.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.format.number_lists import Ints
from shardckpt.plan.read_plan import WINDOW_BYTES, Reads

__all__ = ["NeededBlocks", "Segments", "Unit", "find_segments", "units_of", "wanted_runs"]

_WINDOW_BLOCKS = WINDOW_BYTES // BLOCK_BYTES


class NeededBlocks(msgspec.Struct, array_like=True, frozen=True):
    """The blocks that a rank needs.

    Attributes:
        machine: The name of its machine.
        runs: The bytes of `wanted_runs`.
        nearby: The numbers of the shards that lie on a disk of its machine alone, or None if all
            ranks read from the same storage.
    """

    machine: str
    runs: bytes
    nearby: tuple[int, ...] | None = None


class Segments(msgspec.Struct, array_like=True, frozen=True):
    """Consecutive blocks of a shard that the same ranks read or receive.

    Attributes:
        rows: (shard, first block, end block, number of the group) of each segment, in order.
        groups: The ranks that may read, and the ranks that need the blocks, for each group.
    """

    rows: tuple[tuple[int, int, int, int], ...] = ()
    groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Unit:
    """Blocks of one window that one rank reads and sends to others.

    Attributes:
        tag: The number of the unit, by which its messages are known.
        shard: The shard.
        first: Its first block.
        end: The block after its last one.
        path: The ranks that have it or get it. The first one reads it. Each rank sends it on to
            those at twice its position plus one and plus two.
    """

    tag: int
    shard: int
    first: int
    end: int
    path: tuple[int, ...]

    @property
    def size_blocks(self) -> int:
        """The number of blocks."""
        return self.end - self.first

    def source(self, rank: int) -> int | None:
        """Return the rank from which a rank of the path gets the blocks. None for the first one."""
        position = self.path.index(rank)
        return self.path[(position - 1) // 2] if position else None

    def targets(self, rank: int) -> tuple[int, ...]:
        """Return the ranks to which a rank of the path sends the blocks."""
        position = self.path.index(rank)
        return self.path[2 * position + 1 : 2 * position + 3]


def wanted_runs(reads: Reads) -> Ints:
    """Return the runs of blocks that reads touch: rows of (shard, first block, end block)."""
    copies = [(copy.shard, copy.begin, copy.end) for copy in reads.copies]
    rows = np.concatenate([reads.direct[:, :3], np.array(copies, np.int64).reshape(-1, 3)])
    shard, first, end = rows[:, 0], rows[:, 1] // BLOCK_BYTES, -(-rows[:, 2] // BLOCK_BYTES)
    order = np.lexsort((first, shard))
    shard, first, end = shard[order], first[order], end[order]
    if not len(shard):
        return np.empty((0, 3), np.int64)
    # The end of the runs so far in each shard; shards are kept apart by a large offset.
    apart = shard * (int(end.max()) + 1)
    reached = np.maximum.accumulate(end + apart)
    starts = np.flatnonzero(np.r_[True, (first + apart)[1:] > reached[:-1]])
    ends = np.r_[starts[1:] - 1, len(shard) - 1]
    return np.column_stack([shard[starts], first[starts], (reached - apart)[ends]])


def find_segments(wanted: Sequence[NeededBlocks], *, remote: bool) -> Segments:
    """Find the blocks that one rank should read for others.

    These are the blocks that several ranks need, if the storage is remote or the ranks are on
    several machines; and the blocks that lie on a disk of another machine.

    Args:
        wanted: The blocks that each rank needs.
        remote: Whether each read is a request to another machine.
    """
    machines = [rank.machine for rank in wanted]
    holders: dict[int, list[int]] = defaultdict(list)
    for rank, one in enumerate(wanted):
        for shard in one.nearby or ():
            holders[shard].append(rank)
    rows: list[tuple[int, int, int, int]] = []
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for shard, first, end, ranks in _divided([one.runs for one in wanted]):
        near = holders.get(shard, [])
        receivers = tuple(rank for rank in ranks if rank not in near)
        readers = tuple(rank for rank in ranks if rank in near) or tuple(near) or receivers
        several = len(receivers) > 1 and (remote or len({machines[r] for r in receivers}) > 1)
        if receivers and (near or several):
            group = groups.setdefault((readers, receivers), len(groups))
            rows.append((shard, first, end, group))
    return Segments(tuple(rows), tuple(groups))


def _divided(runs: Sequence[bytes]) -> Iterator[tuple[int, int, int, list[int]]]:
    """Divide the runs of all ranks into segments: (shard, first block, end block, ranks)."""
    ranks_of: dict[bytes, list[int]] = defaultdict(list)
    for rank, data in enumerate(runs):
        ranks_of[data].append(rank)
    alike = list(ranks_of.values())
    steps: dict[tuple[int, int], list[tuple[int, bool]]] = defaultdict(list)
    for number, data in enumerate(ranks_of):
        for shard, first, end in np.frombuffer(data, np.int64).reshape(-1, 3).tolist():
            steps[shard, first].append((number, True))
            steps[shard, end].append((number, False))
    active: set[int] = set()
    for (shard, at), (next_shard, to) in itertools.pairwise(sorted(steps)):
        for number, begins in steps[shard, at]:
            (active.add if begins else active.discard)(number)
        if active and shard == next_shard:
            yield shard, at, to, sorted(rank for number in active for rank in alike[number])
        elif shard != next_shard:
            active.clear()


def units_of(segments: Segments) -> list[Unit]:
    """Divide segments into units, and choose the rank that reads each: the same on all ranks.

    The ranks that may read a unit get about the same number of blocks.
    """
    most = max((rank for readers, _ in segments.groups for rank in readers), default=0)
    load = np.zeros(most + 1, np.int64)
    readers_of = [np.array(readers, np.int64) for readers, _ in segments.groups]
    units: list[Unit] = []
    for shard, first, end, group in segments.rows:
        while first < end:
            to = min(end, (first // _WINDOW_BLOCKS + 1) * _WINDOW_BLOCKS)
            candidates = readers_of[group]
            reader = int(candidates[load[candidates].argmin()])
            load[reader] += to - first
            others = [rank for rank in segments.groups[group][1] if rank != reader]
            turn = len(units) % max(1, len(others))  # which ranks send on changes with each unit
            path = (reader, *others[turn:], *others[:turn])
            units.append(Unit(len(units), shard, first, to, path))
            first = to
    return units
