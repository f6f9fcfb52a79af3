"""Loads into modules and objects whose own state has another form than the saved one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import errors


class WithExtra(nn.Module):
    """A module with state of its own besides parameters and buffers."""

    def __init__(self, extra):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


EXTRA = {
    "more keys": ({"a": 1, "b": torch.ones(2)}, {"a": 0}),
    "fewer keys": ({"a": 1}, {"a": 0, "b": 2}),
    "another shape": (torch.ones(5, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)),
    "the same shape": (torch.ones(2), torch.zeros(2)),
    "a dict for nothing": ({"a": [torch.ones(1), 2]}, None),
    "nothing for a dict": (None, {"a": 1}),
    "an empty dict": ({}, {"a": 1}),
    "another list": ([1, torch.ones(2)], [torch.zeros(1)]),
}


@pytest.mark.parametrize("name", EXTRA)
def test_extra_state_of_modules_is_replaced(tmp_path, name):
    saved, own = EXTRA[name]
    shardckpt.save({"m": nn.Sequential(WithExtra(saved))}, tmp_path / "c")
    target = nn.Sequential(WithExtra(own))
    shardckpt.load({"m": target}, tmp_path / "c")
    assert repr(target[0].extra) == repr(saved)


class Holder:
    """An object with state; its tensors may be one and the same."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def state_dict(self):
        return dict(self.tensors)

    def load_state_dict(self, state):
        self.tensors = state


def test_tensors_tied_in_the_target_alone_are_not_mixed_up(tmp_path):
    shardckpt.save({"h": Holder(a=torch.ones(2), b=torch.zeros(2))}, tmp_path / "c")
    one = torch.full((2,), 7.0)
    target = Holder(a=one, b=one)
    shardckpt.load({"h": target}, tmp_path / "c")
    assert target.tensors["a"].tolist() == [1, 1]
    assert target.tensors["b"].tolist() == [0, 0]
    with pytest.raises(errors.StateError, match="same memory"):
        shardckpt.load({"h": {"a": one, "b": one}}, tmp_path / "c")


@pytest.mark.parametrize("order", [("head", "embedding"), ("embedding", "head")])
def test_one_saved_name_fills_tied_tensors(tmp_path, order):
    """Files of Hugging Face hold one name of tied weights, and none of the others."""
    saved = torch.arange(6.0).view(2, 3)
    shardckpt.save({"model": {"embedding.weight": saved}}, tmp_path / "c")
    model = nn.ModuleDict({name: nn.Linear(3, 2, bias=False) for name in order})
    model["head"].weight = model["embedding"].weight
    report = shardckpt.load({"model": model}, tmp_path / "c")
    assert report.missing == ()
    assert torch.equal(model["head"].weight, saved)
    assert model["head"].weight is model["embedding"].weight
    one = nn.Parameter(torch.zeros(2))  # tied to each other, and saved under neither name
    apart = {"a": one, "b": one, "embedding.weight": torch.zeros(2, 3)}
    with pytest.raises(errors.LoadMismatchError) as caught:
        shardckpt.load({"model": apart}, tmp_path / "c")
    assert caught.value.facts["missing"] == ("model.a", "model.b")


def test_buffers_on_meta_that_no_checkpoint_holds(tmp_path):
    def module():
        made = nn.Linear(2, 2)
        made.register_buffer("cache", torch.ones(2), persistent=False)
        return made

    shardckpt.save({"m": module()}, tmp_path / "c")
    shardckpt.load({"m": module()}, tmp_path / "c")
    with torch.device("meta"):
        target = module()
    with pytest.raises(errors.LoadMismatchError) as caught:
        shardckpt.load({"m": target}, tmp_path / "c")
    assert caught.value.facts["missing"] == ("m.cache",)
    shardckpt.load({"m": target}, tmp_path / "c", strict=False)
    assert not target.weight.is_meta


def test_a_device_map_applies_to_ties_once(tmp_path):
    w = torch.ones(2)
    shardckpt.save({"a": {"w": w}, "b": {"w": w}}, tmp_path / "c")
    state = shardckpt.load_state(tmp_path / "c", device_map={"a": "meta", "b": "cpu"})
    assert state["a"]["w"] is state["b"]["w"]
    assert state["a"]["w"].is_meta


@pytest.mark.parametrize("container", [dict, list], ids=["dict", "list"])
def test_a_state_that_contains_itself_is_refused(container, tmp_path):
    shardckpt.save({"a": {"a": 1, "0": 1}}, tmp_path / "c")
    inner = {"t": torch.ones(1)} if container is dict else [torch.ones(1)]
    if container is dict:
        inner["a"] = inner
    else:
        inner.append(inner)
    with pytest.raises(errors.UnsupportedLeafError, match="contains itself") as caught:
        shardckpt.load({"a": inner}, tmp_path / "c")
    assert caught.value.tensor.startswith("a.")
