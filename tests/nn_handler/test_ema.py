"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch

from shardckpt import NNHandler
from tests.nn_handler.models import Body, a_handler, make, same, train, weights, with_data


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
