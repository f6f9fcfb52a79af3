"""Files are divided into parts of even size, which cover every byte."""

from __future__ import annotations

import itertools
import random

import pytest

from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.plan.file_ranges import file_ranges


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 30])
def test_parts_make_up_every_file(world_size):
    chance = random.Random(world_size)
    for _ in range(300):
        count = chance.randrange(1, 12)
        sizes = [
            chance.choice([0, 5, chance.randrange(40 << 20), BLOCK_BYTES * chance.randrange(9)])
            for _ in range(count)
        ]
        parts = [
            part
            for rank in range(world_size)
            for part in file_ranges(sizes, rank=rank, world_size=world_size)
        ]
        assert [(p.file, p.begin) for p in parts] == sorted((p.file, p.begin) for p in parts)
        for file, own in itertools.groupby(parts, lambda part: part.file):
            own = list(own)
            assert own[0].begin == 0
            assert [p.end for p in own] == [*(p.begin for p in own[1:]), None]
            ends = [*(p.end for p in own[:-1]), sizes[file] + 4096]
            lengths = [end - p.begin for p, end in zip(own, ends, strict=True)]
            assert len(own) == 1 or min(lengths) >= BLOCK_BYTES
        assert {part.file for part in parts} == set(range(count))


def test_parts_are_even():
    for sizes in ([100 << 20], [100 << 20, 3, 100 << 20], [1 << 20] * 64):
        total = sum(sizes)
        for rank in range(8):
            own = sum(
                (sizes[p.file] if p.end is None else p.end) - p.begin
                for p in file_ranges(sizes, rank=rank, world_size=8)
            )
            assert abs(own - total / 8) <= BLOCK_BYTES + 16384
