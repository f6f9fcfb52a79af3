"""Each block of a checkpoint in several tiers comes from the first tier that has it intact."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt import TieredStorage
from shardckpt.errors import (
    CorruptionError,
)
from shardckpt.storage.base import WouldWait
from shardckpt.storage.tiered_files import TieredFiles, was_saved_in_parts

STATE = {"w": torch.arange(2_000_000.0), "frozen": torch.ones(70), "step": 3}  # eight blocks
DEADLINE_S = 60


def is_saved(state) -> bool:
    return torch.equal(state["w"], STATE["w"]) and state["step"] == 3


def test_a_lost_fast_tier_comes_from_the_slow_one(tiers, tmp_path, url):
    shardckpt.save(STATE, "step-1", storage=tiers)
    tiers.wait(DEADLINE_S)
    state = {"w": torch.zeros(2_000_000), "step": 0}
    report = shardckpt.load(state, "step-1", storage=tiers, keys=["w", "step"])
    assert list(report.tiers) == [str(tmp_path / "fast/step-1")]
    for path in (tmp_path / "fast/step-1").iterdir():
        path.unlink()
    report = shardckpt.load(state, "step-1", storage=tiers, keys=["w", "step"])
    assert is_saved(state)
    assert list(report.tiers) == [f"{url}/step-1"]


def test_each_block_comes_from_the_first_tier_that_has_it(tiers, tmp_path, url):
    shardckpt.save(STATE, "step-1", storage=tiers)
    tiers.wait(DEADLINE_S)
    (shard,) = (tmp_path / "fast/step-1").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    for at in (3 << 20, 6 << 20):
        data[at] ^= 1
    shard.write_bytes(data)
    state = {"w": torch.zeros(2_000_000), "step": 0}
    report = shardckpt.load(state, "step-1", storage=tiers, keys=["w", "step"])
    assert is_saved(state)
    assert report.tiers[f"{url}/step-1"] == 2 << 20
    assert report.tiers[str(tmp_path / "fast/step-1")] > 5 << 20
    with shardckpt.open_checkpoint("step-1", storage=tiers) as checkpoint:
        assert torch.equal(checkpoint["w"][...], STATE["w"])
    # the rest of the shard is gone
    shard.write_bytes(data[: 5 << 20])
    assert is_saved(shardckpt.load_state("step-1", storage=tiers))
    (tmp_path / "fast/step-1/manifest.json").write_bytes(b"{}")
    assert is_saved(shardckpt.load_state("step-1", storage=tiers))


def test_damage_in_all_tiers_is_corruption(tmp_path):
    tiers = TieredStorage(tmp_path / "a", tmp_path / "b")
    shardckpt.save(STATE, "step-1", storage=tiers)
    tiers.wait(DEADLINE_S)
    for folder in "ab":
        (shard,) = (tmp_path / folder / "step-1").glob("*.safetensors")
        data = bytearray(shard.read_bytes())
        data[3 << 20] ^= 1
        shard.write_bytes(data)
    with pytest.raises(CorruptionError, match="block 3"):
        shardckpt.load_state("step-1", storage=tiers)


def opened(tiers) -> TieredFiles:
    files = tiers.open(tiers.full_path("step-1"))
    assert isinstance(files, TieredFiles)
    return files


@pytest.fixture
def copied(tmp_path):
    """A checkpoint in two folders, and its shard."""
    tiers = TieredStorage(tmp_path / "a", tmp_path / "b")
    shardckpt.save({"w": torch.arange(9.0)}, "step-1", storage=tiers)
    tiers.wait(DEADLINE_S)
    (shard,) = (tmp_path / "a/step-1").glob("*.safetensors")
    return tiers, shard


def test_the_error_is_that_of_the_first_tier(copied, tmp_path):
    tiers, shard = copied
    files = opened(tiers)
    for folder in "ab":
        (tmp_path / folder / "step-1" / shard.name).unlink()
    with pytest.raises(CorruptionError, match="missing") as raised:
        files.size_bytes(shard.name)
    assert raised.value.path == str(shard)
    files.close()


def test_a_tier_with_another_checkpoint_is_not_read(copied, tmp_path):
    tiers, shard = copied
    shardckpt.save({"w": torch.zeros(9)}, tmp_path / "b/step-1", overwrite=True)
    files = opened(tiers)
    shard.unlink()
    with pytest.raises(CorruptionError, match="missing"):
        files.map(shard.name)
    with pytest.raises(CorruptionError, match="has another checkpoint") as raised:
        files.copies()[1].manifest()
    assert raised.value.path == str(tmp_path / "b/step-1")
    assert raised.value.remedy == "wait until it is copied"
    files.close()


def test_reads_that_may_not_wait_are_refused_and_full_buffers_reported_once(copied):
    tiers, shard = copied
    files, filled = opened(tiers), []
    buffers = [memoryview(bytearray(4)), memoryview(bytearray(5))]
    with pytest.raises(WouldWait):
        files.readinto(shard.name, buffers, offset=0, wait=False)
    expected = shard.read_bytes()
    shard.write_bytes(expected[:6])  # the first tier fills one buffer, and then fails
    files.readinto(
        shard.name, buffers, offset=0, on_filled=lambda buffer: filled.append(bytes(buffer))
    )
    assert filled == [expected[:4], expected[4:9]]
    files.close()


def test_verified_bytes_are_counted_by_tier(copied, tmp_path):
    tiers, _ = copied
    files = opened(tiers)
    assert files.bytes_read() == {}
    files.copies()[1].count_verified(5)
    files.copies()[1].count_verified(2)
    assert files.bytes_read() == {str(tmp_path / "b/step-1"): 7}
    files.close()


def test_a_duplicate_stays_open(copied):
    tiers, shard = copied
    files = opened(tiers)
    other = files.duplicate()
    files.close()
    assert bytes(other.map(shard.name)) == shard.read_bytes()
    other.close()


def test_a_note_in_the_manifest_says_that_it_was_saved_in_parts():
    assert was_saved_in_parts(b'{"notes":{"parts":"2"},"other":1}')
    assert not was_saved_in_parts(b'{"notes":{"other":"parts"}}')
    assert not was_saved_in_parts(b"{}")
    with pytest.raises(CorruptionError, match="not valid JSON") as raised:
        was_saved_in_parts(b'{"notes":{"parts":')
    assert raised.value.remedy == "load another checkpoint"
