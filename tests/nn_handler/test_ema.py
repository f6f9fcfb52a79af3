"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardckpt import NNHandler
from shardckpt.errors import StateError
from shardckpt.nn_handler.ema import EMA, check_decay
from tests.nn_handler.models import Body, NormNet, a_handler, make, same, train, weights, with_data


class Growing(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0, 4))

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, x])[-32:]
        return super().forward(x)


def test_an_average_follows_a_buffer_that_grows():
    handler = train(make(Growing), ema_decay=0.9)
    assert torch.equal(handler.ema.weights["seen"], handler.module.seen)


@pytest.mark.parametrize("name", ["c", "c.pth"])
def test_the_average_goes_on_and_the_model_is_not_its_copy(tmp_path, name):
    handler = train(a_handler(), ema_decay=0.9)
    handler.auto_save(interval=1, save_path=tmp_path / "auto", name=name)
    train(handler, ema_decay=0.9)
    own, average = weights(handler), dict(handler.ema.weights)
    assert not same(own, average)
    resumed = NNHandler.load(tmp_path / "auto" / name)
    assert same(weights(resumed), own)
    assert same(resumed.ema.weights, average)
    before = resumed.ema
    with_data(resumed).auto_save(interval=None)
    train(resumed)  # goes on without being told ema_decay again
    train(handler)
    assert resumed.ema is before
    assert same(resumed.ema.weights, handler.ema.weights)
    with handler.ema_weights():
        assert same(weights(handler), handler.ema.weights)
    assert NNHandler.load(tmp_path / "auto" / name, skip_ema=True).ema is None


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


def test_the_average_moves_by_the_decay_and_buffers_are_copied():
    model = NormNet()
    fill(model, 1.0)
    ema = EMA(model, 0.75)
    fill(model, 5.0)
    ema.update(model)
    ema.update(model)
    assert set(ema.weights["head.weight"].unique().tolist()) == {5 - 4 * 0.75**2}
    assert set(ema.weights["body.1.running_mean"].tolist()) == {5.0}
    assert ema.weights["body.1.num_batches_tracked"] == 5  # an int


def test_a_model_with_other_tensors_of_the_same_names_is_followed():
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    ema.update(model)
    model.weight = nn.Parameter(torch.full((2, 2), 8.0))
    before = ema.weights["weight"].clone()
    ema.update(model)
    assert torch.allclose(ema.weights["weight"], (before + 8.0) / 2)


def test_the_model_has_the_averages_inside_the_block_alone():
    model = NormNet()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema = EMA(model, 0.5, {name: torch.full_like(t, 3) for name, t in own.items()})
    with pytest.raises(ValueError, match="planted"), ema.applied(model):
        assert all((tensor == 3).all() for tensor in model.state_dict().values())
        raise ValueError("planted")
    assert same(dict(model.state_dict()), own)


def test_averages_of_another_model_are_refused():
    saved = EMA(nn.Linear(2, 2), 0.5).weights
    assert EMA(nn.Linear(2, 2), 0.5, saved).weights is saved
    for model in (nn.Linear(2, 3), nn.Linear(2, 2, bias=False), NormNet()):
        with pytest.raises(StateError, match="do not fit the model"):
            EMA(model, 0.5, saved)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, float("nan"), "0.9", None])
def test_a_decay_lies_below_one(decay):
    with pytest.raises(StateError, match="Invalid ema_decay") as caught:
        check_decay(decay)
    assert caught.value.actual == repr(decay)
    check_decay(0)
    check_decay(0.999)
