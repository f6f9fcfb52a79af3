"""One rank reads the blocks that several ranks need."""

from __future__ import annotations

import random

import numpy as np
import torch

from shardckpt.plan.read_plan import CopyRead, Reads
from shardckpt.plan.shared_reads import NeededBlocks, Segments, find_segments, units_of, wanted_runs

MIB = 1 << 20


def wanted(machine: int, *runs: tuple[int, int, int], nearby: tuple[int, ...] | None = None):
    data = np.array(runs, np.int64).reshape(-1, 3).tobytes()
    return NeededBlocks(f"machine{machine}", data, nearby)


def test_runs_of_blocks():
    direct = [(1, 5, 3 * MIB, 0), (0, 10 * MIB, 10 * MIB + 1, 0), (0, MIB - 1, MIB + 1, 0)]
    direct += [(1, 3 * MIB, 4 * MIB, 0), (1, 2 * MIB, 2 * MIB + 5, 0), (3, 0, 9 * MIB, 0)]
    copy = CopyRead(0, 12 * MIB, 12 * MIB + 8, torch.float32, (2,), (1,), torch.empty(2))
    found = wanted_runs(Reads(direct=np.array(direct, np.int64), copies=[copy])).tolist()
    assert found == [[0, 0, 2], [0, 10, 11], [0, 12, 13], [1, 0, 4], [3, 0, 9]]
    none = Reads(direct=np.empty((0, 4), np.int64), copies=[])
    assert wanted_runs(none).shape == (0, 3)


def test_replicas_on_several_machines_are_read_once_each_by_another_rank():
    ranks = [wanted(rank, (0, 0, 400), (1, 3, 7)) for rank in range(4)]
    units = units_of(find_segments(ranks, remote=False))
    assert sum(unit.size_blocks for unit in units) == 404
    assert all(sorted(unit.path) == [0, 1, 2, 3] for unit in units)
    load = [sum(u.size_blocks for u in units if u.path[0] == rank) for rank in range(4)]
    assert max(load) - min(load) <= 4
    for unit in units:
        assert unit.first // 4 == (unit.end - 1) // 4, "a unit is in one window"
        for rank in unit.path[1:]:
            assert rank in unit.targets(unit.source(rank))
        assert unit.source(unit.path[0]) is None
        assert len(unit.targets(unit.path[0])) == 2


def test_one_machine_uses_its_page_cache():
    ranks = [wanted(0, (0, 0, 400))] * 4
    assert find_segments(ranks, remote=False) == Segments()
    assert find_segments(ranks, remote=True).rows == ((0, 0, 400, 0),)
    apart = [wanted(rank, (0, 100 * rank, 100 * rank + 100)) for rank in range(4)]
    assert find_segments(apart, remote=True) == Segments(), "no rank needs what another one does"


def test_shards_on_the_disk_of_one_machine_come_from_there():
    # Ranks 0 and 1 hold shard 0, rank 2 holds shard 1. Rank 3 holds nothing.
    ranks = [
        wanted(0, (0, 0, 8), nearby=(0,)),
        wanted(0, (0, 0, 8), (1, 0, 4), nearby=(0,)),
        wanted(1, (0, 4, 8), nearby=(1,)),
        wanted(2, (2, 0, 4), nearby=()),
    ]
    units = units_of(find_segments(ranks, remote=False))
    found = {(unit.shard, unit.first, unit.end): unit.path for unit in units}
    assert found == {(0, 4, 8): (0, 2), (1, 0, 4): (2, 1)}


def test_each_rank_gets_what_it_needs_and_nothing_is_read_twice():
    dice = random.Random(5)
    for _ in range(200):
        world_size = dice.randint(2, 6)
        needs: list[set[tuple[int, int]]] = []
        ranks = []
        for _ in range(world_size):
            blocks = {
                (shard, block)
                for shard in range(3)
                for block in range(dice.randint(0, 3), dice.randint(3, 20))
                if dice.random() < 0.8
            }
            runs = [(shard, block, block + 1) for shard, block in sorted(blocks)]
            needs.append(blocks)
            near = (
                tuple(s for s in range(3) if dice.random() < 0.3) if dice.random() < 0.7 else None
            )
            ranks.append(wanted(dice.randint(0, 2), *runs, nearby=near))
        segments = find_segments(ranks, remote=dice.random() < 0.5)
        units = units_of(segments)
        moved: set[tuple[int, int]] = set()
        for unit in units:
            blocks = {(unit.shard, number) for number in range(unit.first, unit.end)}
            assert not moved & blocks, "one rank reads a block for others"
            moved |= blocks
            reader, *others = unit.path
            assert others
            assert len(set(unit.path)) == len(unit.path)
            for rank in others:
                assert blocks <= needs[rank], "no rank gets what it does not need"
            near = [r for r in range(world_size) if unit.shard in (ranks[r].nearby or ())]
            assert reader in near if near else blocks <= needs[reader]
            lacking = {r for r in range(world_size) if blocks & needs[r] and r not in near}
            assert lacking <= set(unit.path)
