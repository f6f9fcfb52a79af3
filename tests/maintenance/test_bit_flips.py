"""The flipped bit of a block, found from its digest."""

from __future__ import annotations

import random

import pytest
import xxhash

from shardckpt.maintenance.bit_flips import find_flipped_bit


@pytest.mark.parametrize(
    "size", [1, 7, 16, 17, 128, 129, 240, 241, 1024, 1025, 2048, 2049, 3000, 5120, 9999, 20_000]
)
def test_every_size_has_its_flip_found(size):
    rng = random.Random(size)
    block = bytearray(rng.randbytes(size))
    digest = xxhash.xxh3_64_intdigest(block)
    for at in {0, size // 3, size // 2, size - 1}:
        bit = rng.randrange(8)
        block[at] ^= 1 << bit
        assert find_flipped_bit(block, digest) == (at, bit)
        block[at] ^= 1 << bit


def test_two_flips_are_not_one():
    block = bytearray(random.Random(1).randbytes(5000))
    digest = xxhash.xxh3_64_intdigest(block)
    block[100] ^= 1
    block[4000] ^= 8
    assert find_flipped_bit(block, digest) is None


def test_zeros_with_a_flip():
    block = bytearray(10_000)
    digest = xxhash.xxh3_64_intdigest(block)
    block[5000] ^= 128
    assert find_flipped_bit(block, digest) == (5000, 7)
