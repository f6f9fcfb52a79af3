"""Schedulers step when they should, and every scheduler of torch resumes."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from shardckpt import NNHandler, errors
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
