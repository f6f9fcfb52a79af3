"""Flipped bits, cuts, swapped and missing files: each detected, and the file and tensors named."""

from __future__ import annotations

import random

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.loading import shard_reader as reader
from shardckpt.maintenance import verify
from tests.faults import damage
from tests.faults.disk import Disk

SEED = 4


def test_flipped_bits_are_detected():
    files = damage.a_checkpoint()
    assert sum(map(len, files.values())) >= 16 << 10
    bits = random.Random(SEED).sample(damage.all_bits(files), 500)
    damage.try_flips(files, bits)


def test_truncations_are_detected():
    files = damage.a_checkpoint()
    damage.try_cuts(files, random.Random(SEED).sample(damage.all_cuts(files), 200))


@pytest.mark.parametrize(
    ("files", "name"),
    [pytest.param(files, name, id=what) for what, files, name in damage.other_damage()],
)
def test_swapped_missing_and_longer_files_are_detected(files, name):
    damage.assert_detected(files, name)


def test_a_flipped_bit_is_reported_and_corrupts_only_its_tensor():
    files = damage.a_checkpoint()
    name = max(files, key=lambda name: len(files[name]))
    rng = random.Random(SEED)
    for byte in rng.sample(range(4096, len(files[name])), 5):
        damaged = damage.flip(files, name, byte, 3)
        with shardckpt.open_checkpoint("shelf", storage=damage.Shelf(damaged)) as opened:
            report = opened.verify(strict=False)
            assert len(report.corrupted) == 1
            assert {*report.corrupted, *report.intact} == {"model.w", "model.b", "ids"}
            with pytest.raises(errors.CorruptionError, match="A single bit") as caught:
                opened.verify()
        assert f"bit 3 of byte {byte}" in caught.value.actual


def test_parts_of_a_scrub_check_everything(monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(verify, "find_flipped_bit", lambda data, digest: None)  # takes too long
    shardckpt.save({"w": torch.zeros(1_000_000)}, tmp_path / "c")
    shard = tmp_path / "c" / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with shardckpt.open_checkpoint(tmp_path / "c") as opened:
        reports = [opened.verify(strict=False, subset=(part, 4)) for part in range(1, 5)]
        with pytest.raises(errors.StateError):
            opened.verify(strict=False, subset=(5, 4))
    assert [len(report.errors) for report in reports] == [0, 0, 0, 1]
    assert sum(report.checked_bytes for report in reports) == len(data)


def test_a_reader_that_does_not_verify_would_be_seen(monkeypatch):
    """A planted fault."""
    checked = reader._read_checked
    monkeypatch.setattr(reader, "_read_checked", lambda *span: checked(*span)[:0])
    files = damage.a_checkpoint()
    data = [bit for bit in damage.all_bits(files) if "shard" in bit[0] and bit[1] > 4096]
    with pytest.raises(AssertionError, match="was loaded, from the page cache"):
        damage.try_flips(files, data[:1])


def test_both_ways_of_reading_are_taken(monkeypatch):
    files = damage.a_checkpoint()
    for in_cache in (True, False):
        assert damage.load(files, in_cache=in_cache)["step"] == 3
    monkeypatch.setattr(Disk, "cached", lambda *_, **__: True)
    with pytest.raises(AssertionError, match="0 reads went past"):
        damage.load(files, in_cache=False)


def test_a_reader_that_does_not_verify_past_the_cache_would_be_seen(monkeypatch):
    """A planted fault."""
    monkeypatch.setattr(reader, "corrupted_blocks", lambda shard, low, blocks: [])
    files = damage.a_checkpoint()
    data = [bit for bit in damage.all_bits(files) if "shard" in bit[0] and bit[1] > 4096]
    with pytest.raises(AssertionError, match="was loaded, past the page cache"):
        damage.try_flips(files, data[:1])


def test_a_reader_that_does_not_look_at_sizes_would_be_seen(monkeypatch):
    """A planted fault."""
    monkeypatch.setattr(reader, "check_size", lambda files, shard: None)
    seen = 0
    for _, files, name in damage.other_damage():
        try:
            damage.assert_detected(files, name)
        except AssertionError:
            seen += 1
    assert seen
