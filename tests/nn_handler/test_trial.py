"""A trial of training is undone at its end."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from shardckpt import NNHandler
from shardckpt.nn_handler import EarlyStopping, LearningRateMonitor
from shardckpt.nn_handler.trial import undone
from tests.nn_handler.models import NormNet, Scaled, make, same, train, weights


def snapshot(handler: NNHandler) -> dict:
    progress = ("epoch", "step", "history", "history_epochs", "rates", "runs", "run_steps")
    progress += ("seed_value", "validations", "stop_training", "run_id", "replayed")
    parts = [*handler.optimizers.values(), *handler.schedulers.values(), *handler.callbacks]
    states = [part.state_dict() for part in parts]
    plain = tree_map(lambda v: v.tolist() if isinstance(v, torch.Tensor) else v, states)
    return copy.deepcopy({name: getattr(handler, name) for name in progress} | {"parts": plain})


def prepared() -> NNHandler:
    handler = make(NormNet)
    handler.set_loss_fn(Scaled(2.0))
    handler.set_scheduler(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    handler.add_callback(LearningRateMonitor())
    handler.add_callback(EarlyStopping("loss", patience=1))
    return handler


def test_tensors_progress_and_states_come_back():
    handler = train(prepared(), ema_decay=0.9)
    before, model, factor = snapshot(handler), weights(handler), handler.loss_fn.factor.item()
    averages, position = copy.deepcopy(handler.ema.weights), copy.deepcopy(handler.position)
    with undone(handler):
        train(handler, 2, ema_decay=0.5, seed=7)
        handler.set_grad_scaler()
        assert not same(weights(handler), model)
        assert handler.module.body[1].num_batches_tracked == 18  # a buffer
        assert handler.loss_fn.factor.item() != factor
    assert snapshot(handler) == before
    assert same(weights(handler), model)
    assert handler.loss_fn.factor.item() == factor
    assert same(handler.ema.weights, averages)
    assert (handler.ema.decay, handler.scaler, handler.position) == (0.9, None, position)


def test_an_average_that_the_trial_begins_is_dropped():
    handler = prepared()
    with undone(handler):
        train(handler, ema_decay=0.5)
    assert handler.ema is None


def test_an_error_undoes_the_trial_too():
    handler = prepared()
    before = weights(handler)
    with pytest.raises(ValueError, match="planted"), undone(handler):
        train(handler)
        raise ValueError("planted")
    assert same(weights(handler), before)
    assert handler.step == 0


def test_random_numbers_go_on_as_without_the_trial():
    handler = prepared()

    def draw() -> tuple:
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    with undone(handler):
        expected = draw()
    assert draw() == expected


def test_parameters_of_a_lazy_module_have_no_value_to_restore():
    handler = NNHandler(nn.LazyLinear, device="cpu", out_features=2)
    with undone(handler):
        handler.predict(torch.ones(1, 3))
    assert handler.module.weight.shape == (2, 3)
