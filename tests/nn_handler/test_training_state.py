"""The state of a training that a checkpoint holds."""

from __future__ import annotations

import os

import pytest
import torch

from shardckpt import NNHandler
from shardckpt.errors import StateError
from tests.nn_handler.models import Net, accuracy, make, train


def test_a_value_that_is_logged_too_late_is_an_error():
    handler = make()
    handler.add_callback(lambda handler, metrics: handler.log("late", 1.0))
    with pytest.raises(StateError, match="outside of an epoch"):
        train(handler)


def test_a_save_inside_ema_weights_is_refused(tmp_path):
    handler = train(make(), ema_decay=0.5)
    own = {name: tensor.clone() for name, tensor in handler.module.state_dict().items()}
    for name in ("a", "a.pth"):
        with handler.ema_weights(), pytest.raises(StateError, match="ema=True"):
            handler.save(tmp_path / name)
    assert os.listdir(tmp_path) == []
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a").module.state_dict()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


def test_handlers_share_nothing():
    one, other = NNHandler(Net), NNHandler(Net)
    one.add_metric("m", accuracy)
    one.history["loss"] = [1.0]
    assert other.metrics == {}
    assert other.history == {}
