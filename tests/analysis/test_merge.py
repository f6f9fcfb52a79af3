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


def test_the_configuration_of_the_first_model_is_copied(tmp_path):
    for name in ("a", "b"):
        shardckpt.save({"w": torch.ones(2)}, tmp_path / "c", overwrite=True)
        shardckpt.convert(tmp_path / "c", tmp_path / name, to="hf")
        (tmp_path / name / "config.json").write_text(name)
    paths = [tmp_path / "a", tmp_path / "b"]
    report = shardckpt.merge(paths, tmp_path / "merged", to="hf", keys=["w"])
    assert report.copied == ("config.json",)
    assert (tmp_path / "merged" / "config.json").read_text() == "a"


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
    for sources in (runs[:1], runs[0], 5, None):
        with pytest.raises(errors.StateError, match="Too few"):
            shardckpt.merge(sources, tmp_path / "merged")


@pytest.mark.parametrize(
    ("first", "second", "actual"),
    [
        ({}, {"extra": torch.ones(1)}, "elements of shape"),
        ({"extra": torch.ones(1)}, {}, "no such tensor"),
        ({"extra": torch.ones(1)}, {"extra": torch.ones(1) * 1j}, "complex"),
        ({"extra": torch.ones(1, dtype=torch.int64)}, {"extra": torch.ones(1)}, "floating-point"),
        (
            {"extra": torch.ones(1)},
            {"extra": torch.ones(1).view(torch.uint8).view(torch.bits8)},
            "BITS8",
        ),
    ],
)
def test_no_tensor_is_left_out_and_no_part_of_one(first, second, actual, tmp_path):
    paths = []
    for state in (first, second):
        paths.append(tmp_path / str(len(paths)))
        shardckpt.save({"w": torch.ones(2), **state}, paths[-1])
    with pytest.raises(errors.LoadMismatchError) as caught:
        shardckpt.merge(paths, tmp_path / "merged")
    assert caught.value.tensor == "extra"
    assert actual in caught.value.actual


@pytest.mark.parametrize(
    "arguments",
    [
        {"weights": ["x", 1]},
        {"weights": [None, 1]},
        {"weights": "12"},
        {"weights": 3},
        {"shards": "2"},
        {"shards": 10**9},
        {"keys": 5},
        {"keys": [None]},
        {"rename": ["w"]},
        {"rename": {"w": 5}},
        {"storage": "disk"},
    ],
    ids=str,
)
def test_arguments_of_another_type_are_refused(arguments, runs, tmp_path):
    with pytest.raises(errors.StateError, match="Invalid"):
        shardckpt.merge(runs[:2], tmp_path / "merged", **arguments)


def test_the_sign_of_zero_is_kept(tmp_path):
    for name in ("a", "b"):
        shardckpt.save({"w": torch.tensor([-0.0, 0.0])}, tmp_path / name)
    shardckpt.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert shardckpt.load_state(tmp_path / "c")["w"].signbit().tolist() == [True, False]
