"""Schedulers step when they should, and every scheduler of torch resumes."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from shardckpt import NNHandler, errors
from shardckpt.errors import StateError
from shardckpt.nn_handler.scheduling import Scheduler
from tests.nn_handler.models import Net, data, decay, make, same, schedule, train, weights


def test_the_rates_of_a_scheduler():
    handler = make()
    handler.set_scheduler(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    begun = handler.scheduler.get_last_lr()
    train(handler)
    assert handler.scheduler.get_last_lr() == [rate / 2 for rate in begun]


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {"factor": 0.5, "total_iters": 3},
    "LinearLR": {"start_factor": 0.1, "total_iters": 4},
    "ExponentialLR": {"gamma": 0.8},
    "PolynomialLR": {"total_iters": 5, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 2, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 5},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 40},
    "LambdaLR": {"lr_lambda": decay},
    "MultiplicativeLR": {"lr_lambda": decay},
    "ReduceLROnPlateau": {"patience": 0, "threshold": 0.5},
    "SequentialLR": {
        "schedulers": [
            (lr_scheduler.LinearLR, {"start_factor": 0.5, "total_iters": 2}),
            (lr_scheduler.MultiStepLR, {"milestones": [1, 2]}),
        ],
        "milestones": [2],
    },
    "ChainedScheduler": {
        "schedulers": [
            (lr_scheduler.ConstantLR, {"factor": 0.5, "total_iters": 3}),
            (lr_scheduler.ExponentialLR, {"gamma": 0.9}),
        ]
    },
}


def test_every_scheduler_of_torch_is_here():
    kinds = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind)
        and issubclass(kind, lr_scheduler.LRScheduler)
        and not name.startswith("_")
    }
    assert kinds - {"LRScheduler"} == set(SCHEDULERS)


def with_scheduler(name: str | None, **options) -> NNHandler:
    torch.manual_seed(0)
    handler = NNHandler(Net)
    handler.set_optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    if name == "function":
        handler.set_scheduler(schedule)
    elif name is not None:
        handler.set_scheduler(getattr(lr_scheduler, name), **SCHEDULERS[name], **options)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    return with_loaders(handler)


def with_loaders(handler: NNHandler) -> NNHandler:
    handler.set_train_loader(data(), batch_size=16, shuffle=True)
    handler.set_val_loader(data(15), batch_size=15)
    return handler


def end_state(handler: NNHandler) -> tuple:
    return handler.history, [dict(g, params=None) for g in handler.optimizer.param_groups]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", [*SCHEDULERS, "function"])
def test_every_scheduler_resumes_bit_for_bit(tmp_path, name, interval):
    options = {} if name == "function" else {"interval": interval}
    if (name, interval) == ("ReduceLROnPlateau", "step"):
        with pytest.raises(errors.StateError, match="epoch"):
            with_scheduler(name, **options)
        return
    never = with_scheduler(name, **options)
    never.train(5, progress_bar=False)
    first = with_scheduler(name, **options)
    first.train(2, progress_bar=False)
    first.save(tmp_path / "c")
    if name == "function":  # load calls no function that it was not handed
        with pytest.raises(errors.CheckpointError, match=r"scheduler\.class"):
            NNHandler.load(tmp_path / "c")
        given = {"scheduler.class": schedule}
    else:
        given = {}
    resumed = with_loaders(NNHandler.load(tmp_path / "c", objects=given))
    resumed.train(3, progress_bar=False)
    assert end_state(resumed) == end_state(never)
    assert same(weights(resumed), weights(never))
    assert len(set(never.history["lr"])) > 1


def optimizer(rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=rate)


def scheduler(name: str, given: torch.optim.SGD | None = None, **options) -> Scheduler:
    kind = getattr(lr_scheduler, name)
    return Scheduler(given or optimizer(), kind, SCHEDULERS[name], **options)


def step(one: Scheduler) -> list[float]:
    one.torch.optimizer.step()
    one.after_step()
    return one.get_last_lr()


def test_the_schedules_of_batches_step_with_the_optimizer_by_default():
    found = {name: scheduler(name).interval for name in SCHEDULERS}
    assert {name for name, interval in found.items() if interval == "step"} == {
        "OneCycleLR",
        "CyclicLR",
    }
    assert scheduler("OneCycleLR", interval="epoch").interval == "epoch"


def test_each_interval_ignores_the_other():
    by_step, by_epoch = scheduler("ExponentialLR", interval="step"), scheduler("ExponentialLR")
    assert step(by_step) == [pytest.approx(0.08)]
    assert step(by_epoch) == [0.1]
    for one in (by_step, by_epoch):
        one.after_epoch({"val_loss": 1.0})
        assert one.get_last_lr() == [pytest.approx(0.08)]


def test_an_interval_is_a_step_or_an_epoch():
    with pytest.raises(StateError, match="Invalid value for interval") as caught:
        scheduler("StepLR", interval="batch")
    assert caught.value.actual == "'batch'"
    with pytest.raises(StateError, match="needs the metrics of an epoch"):
        scheduler("ReduceLROnPlateau", interval="step")


def test_a_plateau_is_seen_in_the_monitored_metric_alone():
    one = scheduler("ReduceLROnPlateau", monitor="accuracy")
    assert one.needs_metric
    one.after_epoch({"accuracy": 1.0})
    one.after_epoch({"val_loss": 9.0})  # an epoch without validation
    assert one.get_last_lr() == [0.1]
    one.after_epoch({"accuracy": 1.0})
    assert one.get_last_lr() == [pytest.approx(0.01)]


def test_a_new_optimizer_gets_a_new_schedule_of_the_same_kind():
    one = scheduler("ExponentialLR", interval="step", monitor="loss")
    step(one)
    other = one.for_optimizer(optimizer(0.5))
    assert (other.interval, other.monitor) == ("step", "loss")
    assert other.get_last_lr() == [0.5]
    assert step(other) == [pytest.approx(0.4)]
    assert one.get_last_lr() == [pytest.approx(0.08)]


def test_a_new_base_scales_the_bounds_of_a_cycle_and_the_inner_schedules():
    cyclic = scheduler("CyclicLR")
    cyclic.set_base(0.002)
    assert (cyclic.torch.base_lrs, cyclic.torch.max_lrs) == ([0.002], [pytest.approx(0.2)])
    chain = scheduler("SequentialLR")
    chain.set_base(0.3)
    assert [inner.base_lrs for inner in chain.torch._schedulers] == [[0.3], [0.3]]


@pytest.mark.parametrize("item", [optimizer, (lr_scheduler.StepLR,), (lr_scheduler.StepLR, 3)])
def test_the_inner_schedules_are_pairs(item):
    with pytest.raises(StateError, match="not a pair") as caught:
        Scheduler(optimizer(), lr_scheduler.ChainedScheduler, {"schedulers": [item]})
    assert caught.value.actual == f"an instance of {type(item).__name__}"


def test_the_description_holds_classes_by_name():
    described = scheduler("ChainedScheduler", monitor="loss").description()
    assert described["class"] == {"shardckpt.import": "torch.optim.lr_scheduler:ChainedScheduler"}
    assert described["options"]["schedulers"][1] == (
        {"shardckpt.import": "torch.optim.lr_scheduler:ExponentialLR"},
        {"gamma": 0.9},
    )
    assert (described["interval"], described["monitor"]) == ("epoch", "loss")


def test_milestones_are_counters_again():
    one = scheduler("MultiStepLR")
    state = {**one.state_dict(), "milestones": {1: 1, 2: 1}}
    one.load_state_dict(state)
    assert type(one.torch.milestones) is Counter
    assert [step_of_epoch(one) for _ in range(2)] == [[pytest.approx(0.01)], [pytest.approx(0.001)]]


def step_of_epoch(one: Scheduler) -> list[float]:
    one.torch.optimizer.step()
    one.after_epoch({})
    return one.get_last_lr()


@pytest.mark.parametrize("name", ["step", "get_lr", "optimizer", "state_dict"])
def test_a_state_replaces_no_method(name):
    one = scheduler("StepLR")
    with pytest.raises(StateError, match="replace one of its methods") as caught:
        one.load_state_dict({**one.state_dict(), name: 3})
    assert caught.value.actual == name
    chain = scheduler("ChainedScheduler")
    state = chain.state_dict()
    state["_schedulers"][0][name] = 3
    with pytest.raises(StateError, match="replace one of its methods"):
        chain.load_state_dict(state)
