"""The loss, its terms and the metrics of an epoch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shardckpt import NNHandler, errors
from shardckpt.nn_handler import Callback
from shardckpt.nn_handler.epoch_metrics import EpochSums
from tests.nn_handler.models import FailAt, a_handler, accuracy, data, f1, make, train


def two_terms(outputs, targets):
    ce = nn.functional.cross_entropy(outputs, targets)
    return {"loss": ce + 1.0, "ce": ce}


def test_the_terms_of_a_loss_are_in_the_history():
    handler = make()
    handler.set_loss_fn(two_terms)
    history = train(handler).history
    assert history["loss"][0] == pytest.approx(history["ce"][0] + 1.0)
    assert "val_ce" in history


def always_one(outputs, targets):
    return 1.0


def test_a_metric_that_is_added_before_a_resume_counts_its_own_samples(tmp_path):
    def job(stop):
        handler = make()
        handler.add_callback(FailAt(stop))
        handler.auto_save(interval=1, save_path=tmp_path, resume="auto")
        return handler

    with pytest.raises(KeyError):
        train(job(3))
    handler = job(0)
    handler.add_metric("one", always_one)
    assert train(handler).history["one"] == [1.0]


class Counts:
    """As the metrics of torchmetrics behave."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right = self.all = 0

    def update(self, outputs, targets) -> None:
        self.right += int((outputs.argmax(1) == targets).sum())
        self.all += len(targets)

    def compute(self) -> float:
        return self.right / self.all


def test_a_metric_object_computes_over_the_epoch():
    handler = make()
    handler.add_metric("counted", Counts())
    handler.add_metric("accuracy", accuracy)
    history = train(handler, 2).history
    assert history["counted"] == pytest.approx(history["accuracy"])
    assert history["val_counted"] == pytest.approx(history["val_accuracy"])


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, handler, loss):
        if handler.step == self.step:
            raise ValueError("planted")


def test_a_metric_of_a_whole_epoch_gets_all_outputs_at_once(tmp_path):
    def job(folder, stop):
        handler = a_handler()
        handler.add_metric("f1", f1, whole_epoch=True)
        handler.add_callback(Stop(stop))
        handler.auto_save(save_path=folder, interval=-1, resume="auto")
        return handler

    never = train(job(tmp_path / "a", 0), 2)
    inputs, targets = data(15).tensors
    assert never.history["val_f1"][-1] == pytest.approx(float(f1(never.predict(inputs), targets)))
    with pytest.raises(ValueError, match="planted"):
        train(job(tmp_path / "b", 9), 2)
    resumed = train(job(tmp_path / "b", 0), 2)  # in the middle of an epoch
    assert resumed.history == never.history
    loaded = NNHandler.load(tmp_path / "a" / "epoch2")
    assert loaded.whole_epoch == ["f1"]


@pytest.mark.parametrize("value", [None, "high", torch.ones(2)])
def test_a_metric_that_is_no_number_is_named(value):
    handler = a_handler()
    handler.add_metric("odd", lambda outputs, targets: value)
    with pytest.raises(errors.StateError, match="'odd' returned no number"):
        handler.train(1, progress_bar=False)


def test_a_mean_over_no_sample_is_no_zero():
    assert math.isnan(EpochSums(a_handler()).means()["loss"])
