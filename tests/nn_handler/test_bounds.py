"""A checkpoint creates no module that is far larger than its tensors."""

from __future__ import annotations

import pytest
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors


def test_a_size_is_bounded_without_strict_too(tmp_path):
    state = NNHandler(nn.Linear, in_features=2, out_features=2).state()
    state["config"]["model"]["kwargs"] = {"in_features": 10**6, "out_features": 10**6}
    shardckpt.save(state, tmp_path / "c")
    for options in ({}, {"strict": False}, {"model_class": nn.Linear}, {"device_map": "cpu"}):
        with pytest.raises(errors.CheckpointError, match="larger module than its tensors"):
            NNHandler.load(tmp_path / "c", **options)
