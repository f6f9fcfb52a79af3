"""Averages of several checkpoints."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt import PerRank, errors


@pytest.fixture
def runs(tmp_path):
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        state = {
            "w": torch.randn(3_000_000),
            "half": torch.randn(5).bfloat16(),
            "steps": torch.tensor([seed]),
            "epoch": seed,
            "rng": PerRank(seed),
        }
        paths.append(str(tmp_path / f"run-{seed}"))
        shardckpt.save(state, paths[-1])
    return paths


@pytest.mark.parametrize("name", ["merged", "merged.pth", "merged.safetensors"])
@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 0.25], [3, 0, -1]])
def test_the_tensors_are_averaged_with_the_weights(name, weights, runs, tmp_path):
    states = [shardckpt.load_state(path) for path in runs]
    shardckpt.merge(runs, tmp_path / name, weights=weights)
    shares = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    shares /= shares.sum()
    shardckpt.convert(tmp_path / name, tmp_path / "again")
    merged = shardckpt.load_state(tmp_path / "again")
    for key in ("w", "half"):
        wide = sum(share * state[key].double() for share, state in zip(shares, states, strict=True))
        assert torch.equal(merged[key], wide.to(merged[key].dtype))
        assert merged[key].dtype == states[0][key].dtype
    assert merged["steps"].tolist() == [0]  # of the first
    assert merged["epoch"] == 0
    assert merged["rng"] == [0]


def test_checkpoints_with_other_tensors_are_refused(runs, tmp_path):
    shardckpt.save({"w": torch.zeros(2), "half": torch.zeros(5)}, tmp_path / "other")
    with pytest.raises(errors.LoadMismatchError) as caught:
        shardckpt.merge([runs[0], tmp_path / "other"], tmp_path / "merged")
    assert (caught.value.tensor, caught.value.path) == ("w", str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()
    shardckpt.merge([runs[0], tmp_path / "other"], tmp_path / "merged", keys="half")
    assert list(shardckpt.load_state(tmp_path / "merged")) == ["half"]


@pytest.mark.parametrize("weights", [[1], [1, -1], [float("nan"), 1], [float("inf"), 1]])
def test_invalid_weights_are_refused(weights, runs, tmp_path):
    with pytest.raises(errors.StateError, match="Invalid weights"):
        shardckpt.merge(runs[:2], tmp_path / "merged", weights=weights)


def test_one_checkpoint_is_not_merged(runs, tmp_path):
    for sources in (runs[:1], runs[0]):
        with pytest.raises(errors.StateError, match="Too few"):
            shardckpt.merge(sources, tmp_path / "merged")
