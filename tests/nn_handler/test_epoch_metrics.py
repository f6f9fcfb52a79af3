"""The loss, its terms and the metrics of an epoch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shardckpt import NNHandler, errors
from shardckpt.nn_handler import Callback, epoch_metrics
from shardckpt.nn_handler.batch import Result
from shardckpt.nn_handler.epoch_metrics import EpochSums, WholeEpoch, accumulates
from shardckpt.nn_handler.parallel import Layout
from tests.nn_handler.models import (
    FailAt,
    OwnObject,
    X,
    Y,
    a_handler,
    accuracy,
    data,
    f1,
    make,
    train,
)


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


ONE_RANK = Layout(mode="none", device=torch.device("cpu"))


def result(loss: float, size: int = 1, **parts) -> Result:
    return Result(loss=torch.tensor(loss), size=size, **parts)


def test_each_value_has_its_own_count():
    sums = EpochSums(make())
    sums.add(result(3.0, size=2, terms={"ce": torch.tensor(1.0)}))
    sums.add(result(6.0, size=1))
    sums.log("norm", 8.0)
    sums.log("norm", torch.tensor([4.0]))
    assert sums.means() == {"loss": 4.0, "ce": 1.0, "norm": 6.0}


def test_the_loss_and_the_metrics_come_first():
    handler = make()
    handler.add_metric("zeros", lambda outputs, targets: 0.0)
    sums = EpochSums(handler)
    sums.log("share", 1.0)
    sums.add(result(1.0, outputs=X, targets=Y, terms={"ce": 2.0}))
    assert list(sums.means()) == ["loss", "zeros", "share", "ce"]


def test_the_losses_of_other_optimizers_alone_leave_no_mean_loss():
    sums = EpochSums(make())
    sums.log("loss_critic", 2.0)
    assert sums.means() == {"loss_critic": 2.0}


@pytest.mark.parametrize("name", ["val_ce", "lr", 3])
def test_a_term_of_the_loss_has_a_free_name(name):
    with pytest.raises(errors.StateError, match="name of"):
        EpochSums(make()).add(result(1.0, terms={name: 1.0}))


def test_a_name_belongs_to_one_source():
    handler = make()
    handler.add_metric("share", lambda outputs, targets: 0.5)
    sums = EpochSums(handler)
    sums.log("norm", 1.0)
    sums.log("norm", 1.0)
    with pytest.raises(errors.StateError, match="Two values have one name") as caught:
        sums.add(result(1.0, terms={"norm": 1.0}))
    assert caught.value.actual == "'norm' is a logged value and a term of the loss"
    with pytest.raises(errors.StateError, match="Two values have one name") as caught:
        sums.log("share", 1.0)
    assert caught.value.actual == "'share' is a metric and a logged value"


def test_sums_are_exact_where_single_precision_is_not():
    sums = EpochSums(make())
    for _ in range(3):
        sums.add(result(0.1, size=1 << 24))
    assert sums.means()["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-15)


def test_validation_has_metric_objects_of_its_own():
    handler = make()
    handler.add_metric("seen", OwnObject())
    training = EpochSums(handler)
    training.add(result(1.0, outputs=X, targets=Y))
    validation = EpochSums(handler, validation=True)
    validation.add(result(1.0, outputs=X, targets=Y[:5]))
    assert validation.means()["seen"] == 5
    assert training.means()["seen"] == 96
    assert EpochSums(handler).means()["seen"] == 0  # an epoch starts with a reset


def test_an_object_accumulates_if_it_has_all_three_methods():
    assert accumulates(OwnObject())
    assert not accumulates(OwnObject)
    assert not accumulates(nn.L1Loss())
    assert not accumulates(lambda outputs, targets: 0.0)


def test_sums_go_on_from_their_state():
    sums = EpochSums(make())
    sums.add(result(3.0, size=2, terms={"ce": 4.0}))
    again = EpochSums(make())
    again.load({**sums.state(), "sums": {"loss": 6.0, "ce": 8.0}})
    again.add(result(6.0, terms={"ce": 1.0}))
    assert again.means() == {"loss": 4.0, "ce": 3.0}


def test_checkpoints_of_0_1_have_one_count_for_all_sums():
    sums = EpochSums(make())
    sums.load({"sums": {"loss": 6.0, "accuracy": 3.0}, "count": 4})
    assert (sums.means()["loss"], sums.counts["accuracy"]) == (1.5, 4)


def test_a_state_holds_the_batches_of_its_time():
    metric = WholeEpoch(lambda outputs, targets: float(outputs.sum()), ONE_RANK)
    assert metric.state().plain() == {}
    metric.update({"a": torch.ones(2)}, (torch.zeros(2),))
    state = metric.state()
    metric.update({"a": torch.ones(3)}, (torch.zeros(3),))
    plain = state.plain()
    assert plain["outputs"]["a"].tolist() == [1, 1]
    assert type(plain["targets"]) is tuple
    other = WholeEpoch(lambda outputs, targets: float(outputs["a"].sum()), ONE_RANK)
    other.load(plain)
    other.update({"a": torch.ones(1)}, (torch.zeros(1),))
    assert other.compute() == 3.0
    other.load({})
    assert math.isnan(other.compute())


class Torchmetric:
    """As the metrics of torchmetrics: `_defaults` names the states."""

    sync = True

    def __init__(self) -> None:
        self._defaults = {"total": torch.tensor(0.0), "seen": []}
        self.reset()

    def reset(self):
        self.total, self.seen = torch.tensor(0.0), []

    def update(self, outputs, targets):
        self.total += len(targets)
        self.seen.append(len(targets))

    def compute(self):
        return self.total + len(self.seen)


def test_the_states_of_a_metric_are_copied_and_come_back():
    handler = make()
    handler.add_metric("seen", Torchmetric())
    sums = EpochSums(handler)
    sums.add(result(1.0, outputs=X, targets=Y))
    state = sums.state()
    sums.add(result(1.0, outputs=X, targets=Y))
    assert state["metrics"]["seen"] == {"total": torch.tensor(96.0), "seen": [96]}
    again = EpochSums(handler)
    metrics = {"seen": {**state["metrics"]["seen"], "other": 3}}
    again.load({"sums": {"loss": 1.0}, "counts": {"loss": 96}, "metrics": metrics})
    assert again.means()["seen"] == 97.0
    assert not hasattr(handler.metrics["seen"], "other")


def test_a_step_without_outputs_is_warned_of_once():
    handler = make()
    handler.add_metric("share", lambda outputs, targets: 0.5)
    sums = EpochSums(handler)
    with pytest.warns(UserWarning, match="the metrics share are not computed"):
        sums.add(result(1.0))
    sums.add(result(1.0))
    assert "share" not in sums.means()


@pytest.mark.parametrize("value", [torch.tensor([[2.5]], requires_grad=True), 2.5, "2.5"])
def test_a_number_may_have_several_forms(value):
    assert float(epoch_metrics._number(value, "a")) == 2.5
