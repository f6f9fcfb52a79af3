"""Checkpoints that Lightning wrote, see made_by/write_lightning.py, and those written for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import errors

HOME = Path(__file__).parent / "made_by"
WRITTEN = ["lightning-2.6.ckpt", "lightning-2.6-sharded.ckpt"]


def model() -> nn.Module:
    made = nn.Module()
    made.layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    return made


@pytest.mark.parametrize("name", WRITTEN)
def test_checkpoints_of_lightning_are_read(name, tmp_path):
    report = shardckpt.convert(HOME / name, tmp_path / "c")
    state = shardckpt.load_state(tmp_path / "c")
    wanted = torch.load(HOME / f"{name}.expected.pt", weights_only=True)
    weights = state["state_dict"]
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
    assert (state["epoch"], state["global_step"]) == (1, 4)
    assert state["hyper_parameters"]["arguments"] == {"width": 3}
    assert report.writer.startswith("Lightning 2.6")
    made = model()
    shardckpt.load({"state_dict": made}, tmp_path / "c", keys=["state_dict"])
    assert torch.equal(made.layers[0].weight, wanted["layers.0.weight"])


def test_a_file_of_lightning_stays_equal_on_its_way_through_ours(tmp_path):
    shardckpt.convert(HOME / WRITTEN[0], tmp_path / "c")
    shardckpt.convert(tmp_path / "c", tmp_path / "back.ckpt", to="lightning")
    found = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert list(found["optimizer_states"][0]["state"]) == [0, 1, 2, 3]
    assert found["optimizer_states"][0]["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert found["pytorch-lightning_version"] == "2.6.6"
    report = shardckpt.diff(HOME / WRITTEN[0], tmp_path / "back.ckpt")
    assert report.equal


def test_a_model_and_its_optimizer_become_a_file_of_lightning(tmp_path):
    made = model()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1)
    made.layers(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    state = {"model": made, "optimizer": optimizer, "scheduler": scheduler, "step": 9}
    shardckpt.save(state, tmp_path / "c")
    report = shardckpt.convert(tmp_path / "c", tmp_path / "x.ckpt", to="lightning")
    assert report.target_format == "lightning"
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert found["global_step"] == 9
    other = model()
    other.load_state_dict(found["state_dict"])
    again = torch.optim.AdamW(other.parameters(), lr=0.5)
    again.load_state_dict(found["optimizer_states"][0])
    assert again.param_groups[0]["lr"] == 0.1
    for old, new in zip(made.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[old]["exp_avg"], again.state[new]["exp_avg"])
    assert found["lr_schedulers"][0]["gamma"] == 0.9
    loop = found["loops"]["fit_loop"]
    assert loop["epoch_loop.state_dict"] == {"_batches_that_stepped": 9}


def test_tensors_alone_are_the_weights(tmp_path):
    weights = model().state_dict()
    torch.save(weights, tmp_path / "w.pt")
    shardckpt.convert(tmp_path / "w.pt", tmp_path / "x.ckpt", to="lightning")
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert found["state_dict"].keys() == weights.keys()
    assert all(torch.equal(found["state_dict"][name], weights[name]) for name in weights)


def test_nested_weights_get_names(tmp_path):
    shardckpt.save({"model": {"a": {"b": torch.ones(2)}, "c": torch.ones(1)}}, tmp_path / "c")
    shardckpt.convert(tmp_path / "c", tmp_path / "x.ckpt", to="lightning")
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert sorted(found["state_dict"]) == ["a.b", "c"]


def test_a_rename_adds_the_prefix_of_a_module(tmp_path):
    shardckpt.save({"model": {"a": torch.ones(2)}, "step": 1}, tmp_path / "c")
    rename = {"model": "state_dict.net"}
    shardckpt.convert(tmp_path / "c", tmp_path / "x.ckpt", to="lightning", rename=rename)
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert list(found["state_dict"]) == ["net.a"]


def test_a_source_without_weights_and_a_wrong_suffix_are_refused(tmp_path):
    shardckpt.save({"net": torch.ones(2), "step": 3}, tmp_path / "c")
    with pytest.raises(errors.StateError, match="state_dict"):
        shardckpt.convert(tmp_path / "c", tmp_path / "x.ckpt", to="lightning")
    for name in ("x.pt", "x.safetensors", "folder"):
        with pytest.raises(errors.StateError, match="does not match the format"):
            shardckpt.convert(tmp_path / "c", tmp_path / name, to="lightning")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
