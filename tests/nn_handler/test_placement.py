"""A model is placed on the devices of a device map."""

from __future__ import annotations

import pytest
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.errors import StateError
from tests.nn_handler.models import make


def test_a_typo_in_a_device_map_is_an_error(tmp_path):
    make().save(tmp_path / "a")
    with pytest.raises(StateError, match="bdoy"):
        NNHandler.load(tmp_path / "a", device_map={"": "cpu", "bdoy": "disk"})
    assert not NNHandler.load(tmp_path / "a", device_map="cpu").model.training


def test_a_model_of_other_sizes_on_a_device_map(tmp_path):
    state = NNHandler(nn.Linear, in_features=2, out_features=2).state()
    state["config"]["model"]["kwargs"] = {"in_features": 3, "out_features": 2}
    shardckpt.save(state, tmp_path / "c")
    with pytest.raises(errors.LoadMismatchError):
        NNHandler.load(tmp_path / "c", device_map="cpu")
