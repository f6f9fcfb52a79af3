"""Blocks are verified as they are read, and corrupted tensors are named."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt.errors import CorruptionError
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.format.manifest import from_bytes
from shardckpt.loading.shard_reader import (
    affected_tensors,
    check_size,
    corrupted_blocks,
    read_all,
    read_box,
)
from shardckpt.plan.read_plan import plan_reads
from tests.faults.damage import Shelf

STATE = {"a": torch.arange(700_000.0).reshape(700, 1000), "b": torch.ones(9)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader") / "c"
    shardckpt.save(STATE, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest_of(files):
    return from_bytes(files["manifest.json"], path="shelf")


def corrupt(files, at):
    (name,) = set(files) - {"manifest.json"}
    data = bytearray(files[name])
    data[at] ^= 1
    return {**files, name: bytes(data)}


@pytest.mark.parametrize("box", [((0, 0), (700, 1000)), ((3, 5), (400, 7)), ((699, 0), (1, 1000))])
def test_a_box_is_read(files, box):
    manifest = manifest_of(files)
    found = read_box(Shelf(files), manifest, manifest.tensors["a"], *box)
    (row, column), (rows, columns) = box
    assert torch.equal(found, STATE["a"][row : row + rows, column : column + columns])


def test_only_a_read_of_a_corrupted_block_fails_and_names_its_tensors(files):
    damaged, manifest = corrupt(files, BLOCK_BYTES + 9), manifest_of(files)
    entry = manifest.tensors["a"]
    read_box(Shelf(damaged), manifest, entry, (0, 0), (10, 1000))
    with pytest.raises(CorruptionError, match="block 1") as caught:
        read_box(Shelf(damaged), manifest, entry, (0, 0), (700, 1000))
    assert caught.value.tensor == "a"
    assert caught.value.path.startswith("shelf/shard-00000")


def test_without_reads_nothing_is_read(files):
    assert read_all(None, manifest_of(files), plan_reads([])) == 0


def test_the_numbers_of_corrupted_blocks_count_from_the_begin_of_the_shard(files):
    (shard,) = manifest_of(files).shards
    damaged = corrupt(files, 2 * BLOCK_BYTES)[shard.name]
    assert corrupted_blocks(shard, 0, memoryview(damaged)) == [2]
    assert corrupted_blocks(shard, 2 * BLOCK_BYTES, memoryview(damaged)[2 * BLOCK_BYTES :]) == [2]
    assert corrupted_blocks(shard, 0, memoryview(files[shard.name])) == []


def test_a_shard_of_another_size_is_refused(files):
    (shard,) = manifest_of(files).shards
    check_size(Shelf(files), shard)
    with pytest.raises(CorruptionError, match="saved size"):
        check_size(Shelf({**files, shard.name: files[shard.name][:-1]}), shard)


def test_the_tensors_in_a_range_of_bytes(files):
    manifest = manifest_of(files)
    _, begin, end = manifest.tensors["b"].chunks[0, :3].tolist()
    assert affected_tensors(manifest, [(begin, begin + 1)], shard=0) == ["b"]
    assert affected_tensors(manifest, [(0, end)], shard=0) == ["a", "b"]
    assert affected_tensors(manifest, [(end, end + 5), (0, 8)], shard=0) == []
    assert affected_tensors(manifest, [(0, end)], shard=1) == []
