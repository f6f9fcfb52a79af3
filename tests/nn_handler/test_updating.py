"""A step of training: several optimizers, steps of one's own, and the nan_guard."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from shardckpt import NNHandler, errors
from shardckpt.errors import StateError
from shardckpt.nn_handler import Callback, LearningRateMonitor
from tests.nn_handler.models import (
    Count,
    NormNet,
    a_gan,
    a_handler,
    accuracy,
    continued_alike,
    data,
    gan_step,
    make,
    resumed_alike,
    same,
    train,
    weights,
    with_data,
)


@pytest.mark.parametrize("name", ["c", "c.pth", "c.safetensors"])
def test_a_gan_trains_two_optimizers_and_resumes(tmp_path, name):
    handler = train(a_gan(), ema_decay=0.9, gradient_clipping_norm=1.0)
    assert set(handler.history) >= {"loss", "loss_discriminator", "val_loss", "lr_discriminator"}
    handler.save(tmp_path / name)
    loaded = with_data(NNHandler.load(tmp_path / name))
    with pytest.raises(errors.StateError, match="set_training_step"):
        train(loaded)
    loaded.set_training_step(gan_step)
    continued_alike(handler, loaded, epochs=2)
    assert handler.history["lr_discriminator"] == [0.1, 0.05, 0.025]


def named_step(handler, batch):
    """Both optimizers have names of their own."""
    inputs, targets = batch
    loss = nn.functional.cross_entropy(handler.module(inputs), targets)
    handler.update(loss, "first")
    handler.update(nn.functional.cross_entropy(handler.module(inputs), targets), "second")


def test_optimizers_of_which_none_is_the_main_one(tmp_path):
    handler = a_handler()
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.SGD, name="first", params="layers", lr=0.1)
    handler.set_optimizer(torch.optim.SGD, name="second", params="head", lr=0.1)
    handler.set_training_step(named_step)
    handler.metrics.clear()
    handler.auto_save(save_path=tmp_path, keep_best=1, monitor="val_loss_second")
    history = train(handler, 2).history
    losses = {"loss_first", "loss_second"}
    assert set(history) == losses | {f"val_{n}" for n in losses} | {"lr_first", "lr_second"}
    assert all(math.isfinite(value) for values in history.values() for value in values)
    assert handler.best_path.endswith("epoch2")


def test_a_step_of_ones_own_that_does_nothing_is_an_error():
    handler = a_gan()
    handler.set_training_step(lambda handler, batch: None)
    with pytest.raises(errors.StateError, match=r"did not call handler\.update"):
        train(handler)
    handler.set_training_step(lambda handler, batch: gan_step(handler, batch) or torch.ones(()))
    with pytest.raises(errors.StateError, match="returned a loss too"):
        train(handler)
    handler.set_training_step(gan_step)
    with pytest.raises(errors.StateError, match="accumulate"):
        train(handler, gradient_accumulation_steps=2)
    with pytest.raises(errors.StateError, match="outside of training"):
        handler.update(torch.ones(()))
    with pytest.raises(errors.StateError, match="no optimizer of this name"):
        handler.update(torch.ones(()), "critic")


def test_lbfgs_trains_and_resumes(tmp_path):
    handler = a_handler()
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.LBFGS, lr=0.5, max_iter=4)
    before = float(train(handler).history["loss"][0])
    resumed_alike(handler, tmp_path / "c")
    assert handler.history["loss"][-1] < before
    assert handler.step == 12
    with pytest.raises(errors.StateError, match="a nan_guard"):
        train(handler, nan_guard="skip")


class NotFinite(nn.Module):
    """The loss of the fifth call is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, outputs, targets):
        self.calls += 1
        factor = math.nan if self.calls == 5 else 1.0
        return nn.functional.cross_entropy(outputs, targets) * factor


class Watch(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.seen = {}

    def on_step_end(self, handler, loss):
        self.seen[handler.step] = weights(handler)


def test_the_nan_guard_goes_back_to_the_last_checkpoint(tmp_path):
    handler = a_handler()
    handler.set_loss_fn(NotFinite())
    with pytest.raises(errors.StateError, match="needs checkpoints"):
        train(handler, nan_guard="restore")
    handler.auto_save(save_path=tmp_path, every_steps=3)
    handler.set_scheduler(torch.optim.lr_scheduler.StepLR, interval="step", step_size=1, gamma=0.5)
    rate = LearningRateMonitor()
    handler.add_callback(rate)
    watch = Watch()
    handler.add_callback(watch)
    with pytest.warns(UserWarning, match="the weights of the last checkpoint are loaded"):
        train(handler, nan_guard="restore", validate_every=0)
    assert handler.step == 6
    assert same(watch.seen[5], watch.seen[3])  # of step 3, which was saved
    assert not same(watch.seen[6], watch.seen[5])
    steps = [0.01 * 0.5**step for step in (1, 2, 3, 4, 4, 5)]  # the fifth step was skipped
    assert [found for (found,) in rate.rates] == pytest.approx(steps)
    assert all(torch.isfinite(w).all() for w in weights(handler).values())


class Damaged(TensorDataset):
    """Some samples are NaN."""

    def __init__(self, samples: list[int]) -> None:
        inputs, targets = data().tensors
        inputs[samples] = math.nan
        super().__init__(inputs, targets)


def a_norm_net(dataset) -> NNHandler:
    torch.manual_seed(0)
    handler = NNHandler(NormNet)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.add_metric("accuracy", accuracy)
    handler.set_train_loader(dataset, batch_size=8)
    return handler


@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_that_is_skipped_leaves_no_trace(batches):
    """As if its batches were not there, whichever of them is not finite."""
    handler, options = a_norm_net(Damaged([17])), {"gradient_accumulation_steps": batches}
    with pytest.warns(UserWarning, match="the step is skipped"):
        train(handler, nan_guard="skip", ema_decay=0.9, **options)
    left = [sample for sample in range(48) if not 16 <= sample < 16 + 8 * batches]
    without = train(a_norm_net(Subset(data(), left)), **options)
    assert same(weights(handler), weights(without))
    assert handler.history == without.history
    assert all(torch.isfinite(average).all() for average in handler.ema.weights.values())


class Root(nn.Module):
    """Its loss is 0 in the first step, and the gradient is infinite or NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        return self.weight.abs().sqrt() + 0 * inputs[:, :1]


@pytest.mark.parametrize("guard", ["skip", "stop"])
def test_the_nan_guard_looks_at_gradients(guard):
    handler = NNHandler(Root)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.MSELoss())
    handler.set_train_loader(TensorDataset(torch.ones(8, 4), torch.zeros(8, 1)), batch_size=4)
    if guard == "skip":
        with pytest.warns(UserWarning, match=r"A gradient of step [12] is not finite"):
            train(handler, nan_guard=guard)
    else:
        with pytest.raises(errors.StateError, match="A gradient is not finite"):
            train(handler, nan_guard=guard)
    assert handler.module.weight.item() == 0


def explodes(outputs, targets):
    return outputs.sum() * (float("nan") if Count.epoch == 0 else 1.0)


def test_the_nan_guard():
    Count.epoch = 0
    handler = make()
    handler.set_loss_fn(explodes)
    before = weights(handler)
    with pytest.warns(UserWarning, match="not finite"):
        train(handler, nan_guard="skip")
    assert same(before, weights(handler))
    with pytest.raises(StateError, match="not finite"):
        train(handler, nan_guard="stop")


def test_accumulated_gradients_are_those_of_all_batches_together():
    found = []
    for size, batches in ((8, 2), (16, 1)):
        handler = a_norm_net(data())
        handler.module.body[1].eval()
        handler.keep_eval_on_module("body.1")
        handler.set_train_loader(data(), batch_size=size)
        train(handler, gradient_accumulation_steps=batches)
        found.append(weights(handler))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_a_loss_without_gradients_is_an_error():
    handler = a_handler()
    handler.set_loss_fn(lambda outputs, targets: outputs.detach().sum())
    with pytest.raises(errors.StateError, match="does not depend on a parameter") as caught:
        train(handler)
    assert "detach()" in caught.value.remedy
    assert handler.step == 0


def test_the_norm_of_the_gradients_is_limited():
    handler = a_handler()
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.SGD, lr=1.0)
    before = weights(handler)
    train(handler, gradient_clipping_norm=0.125, max_steps=1)
    moved = [(weights(handler)[name] - before[name]).flatten() for name in before]
    assert torch.cat(moved).norm() == pytest.approx(0.125, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"nan_guard": "stop"}, "a nan_guard"),
        ({"precision": "fp16"}, "a gradient scaler (fp16)"),
        ({"precision": "fp16", "nan_guard": "skip"}, "a gradient scaler (fp16), a nan_guard"),
        ({}, "other optimizers beside it"),
    ],
)
def test_an_optimizer_that_computes_the_loss_excludes_other_options(options, problem):
    handler = a_handler()
    handler.optimizations.clear()
    params = None if options else "head"
    handler.set_optimizer(torch.optim.LBFGS, params=params, lr=0.5)
    if not options:
        handler.set_optimizer(torch.optim.SGD, name="rest", lr=0.1)
    with pytest.raises(errors.StateError, match="LBFGS computes the loss several times") as caught:
        train(handler, **options)
    assert caught.value.actual == problem
    assert handler.step == 0


def test_a_step_that_the_scaler_skips_moves_no_schedule():
    handler = NNHandler(Root, device="cpu")
    handler.set_optimizer(torch.optim.SGD, lr=0.5)
    handler.set_scheduler(torch.optim.lr_scheduler.ExponentialLR, interval="step", gamma=0.5)
    handler.set_loss_fn(nn.MSELoss())
    samples = TensorDataset(torch.ones(8, 4), torch.ones(8, 1))
    handler.set_train_loader(DataLoader(samples, batch_size=4))
    train(handler, precision="fp16")  # all gradients are infinite
    assert handler.module.weight.item() == 0
    assert handler.scheduler.get_last_lr() == [0.5]
    assert handler.scaler.get_scale() == 2.0**14


def test_update_is_called_in_a_step_of_training_alone():
    handler = a_handler()
    with pytest.raises(errors.StateError, match="update was called outside of training"):
        handler.update(torch.ones(()))
    with pytest.raises(errors.StateError, match="no optimizer of this name") as caught:
        handler.update(torch.ones(()), "critic")
    assert (caught.value.expected, caught.value.actual) == ("main", "'critic'")
