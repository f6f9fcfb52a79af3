"""Each block of a checkpoint in several tiers comes from the first tier that has it intact."""

from __future__ import annotations

import uuid

import pytest
import torch

import shardckpt
from shardckpt import TieredStorage
from shardckpt.errors import (
    CorruptionError,
)

STATE = {"w": torch.arange(2_000_000.0), "frozen": torch.ones(70), "step": 3}  # eight blocks
DEADLINE_S = 60


@pytest.fixture
def url():
    return f"memory://tests/{uuid.uuid4().hex}"


@pytest.fixture
def tiers(tmp_path, url):
    made = TieredStorage(tmp_path / "fast", url)
    yield made
    made.wait(DEADLINE_S)


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
