"""Options of an optimizer change, and its schedule follows."""

from __future__ import annotations

import pytest
import torch

from shardckpt.errors import StateError
from shardckpt.nn_handler.optimization import Optimization
from shardckpt.nn_handler.scheduling import Scheduler
from tests.nn_handler.models import Body, X, make, train


def test_a_changed_rate_is_set_once_and_then_follows_the_schedule(tmp_path):
    def job(epochs):
        handler = make()
        handler.set_optimizer(torch.optim.SGD, lr=0.1)
        handler.set_scheduler(
            torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10, monitor="loss"
        )
        handler.set_hyperparameters(lr=0.5)
        handler.auto_save(interval=1, save_path=tmp_path, resume="auto")
        return train(handler, epochs)

    job(2)
    assert job(4).history["lr"] == pytest.approx([0.5, 0.05, 0.005, 0.0005])


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (torch.optim.lr_scheduler.OneCycleLR, {"max_lr": 0.1, "total_steps": 30}),
        (torch.optim.lr_scheduler.CyclicLR, {"base_lr": 0.1, "max_lr": 0.3, "step_size_up": 4}),
        (torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 5}),
    ],
)
def test_a_changed_rate_scales_the_full_schedule(scheduler, options):
    rates = []
    for changed in (0.1, 0.2):
        handler = make()
        handler.set_optimizer(torch.optim.SGD, lr=0.1)
        handler.set_scheduler(scheduler, interval="step", **options)
        train(handler)
        handler.set_hyperparameters(lr=changed)
        rates.append(torch.tensor(train(handler, 2).history["lr"][1:]))
    assert torch.allclose(2 * rates[0], rates[1])


def optimization(cls=torch.optim.SGD, **options) -> Optimization:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))]},
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5},
    ]
    return Optimization(optimizer=cls(groups, **{"lr": 0.1, **options}), recipe={})


def test_an_optimizer_that_computes_the_loss_by_itself_needs_a_closure():
    parameter = torch.nn.Parameter(torch.ones(1))
    lbfgs = Optimization(optimizer=torch.optim.LBFGS([parameter]), recipe={})
    assert lbfgs.needs_closure
    assert not optimization().needs_closure


def test_options_that_the_optimizer_lacks_are_refused():
    one = optimization()
    with pytest.raises(StateError, match="no such option") as caught:
        one.set_options({"lr": 1.0, "learning_rate": 2.0})
    assert caught.value.actual == "learning_rate"
    assert "momentum" in caught.value.expected
    for wrong in (-0.1, "0.1", True, None):
        with pytest.raises(StateError, match="Invalid rate") as caught:
            one.set_options({"lr": wrong})
        assert caught.value.actual == repr(wrong)
    assert one.rates == [0.1, 0.5]


def test_options_are_set_in_all_groups_and_for_those_to_come():
    one = optimization()
    one.set_options({"lr": 0.2, "momentum": 0.9})
    assert one.rates == [0.2, 0.2]
    one.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert one.rates == [0.2, 0.2, 0.2]
    assert [group["momentum"] for group in one.optimizer.param_groups] == [0.9] * 3


def test_a_rate_that_a_schedule_has_changed_is_scaled():
    one = optimization()
    one.scheduler = Scheduler(one.optimizer, torch.optim.lr_scheduler.ExponentialLR, {"gamma": 0.5})
    for _ in range(2):
        one.optimizer.step()
        one.scheduler.after_epoch({})
    assert one.rates == [0.1 / 4, 0.5 / 4]
    one.set_options({"lr": 0.8})
    assert one.rates == [pytest.approx(0.8 / 4)] * 2
    assert [group["initial_lr"] for group in one.optimizer.param_groups] == [0.8, 0.8]
    one.optimizer.step()
    one.scheduler.after_epoch({})
    assert one.rates == [pytest.approx(0.8 / 8)] * 2


def test_a_schedule_from_zero_takes_the_new_rate():
    one = optimization(lr=0.0)
    one.optimizer.param_groups[1]["lr"] = 0.0
    one.set_options({"lr": 0.3})
    assert one.rates == [0.3, 0.3]


def test_the_description_holds_the_groups_as_they_are_now():
    handler = make()
    handler.set_optimizer(torch.optim.SGD, params="head", groups={"head.bias": {"lr": 0.5}}, lr=0.1)
    handler.optimizer.add_param_group({"params": list(handler.module.body.parameters()), "lr": 0.2})
    described = handler.optimizations["main"].description(handler.module, None)
    assert described["class"] == {"shardckpt.import": "torch.optim.sgd:SGD"}
    assert described["options"] == {"lr": 0.1}
    first, second, third = described["groups"]
    assert first == {"params": ["head.weight"]}
    assert second == {"params": ["head.bias"], "lr": 0.5}
    assert third["params"] == ["body.0.weight", "body.0.bias"]
    assert (third["lr"], third["momentum"]) == (0.2, 0)


def test_parameters_of_another_model_are_not_described():
    handler = make()
    handler.optimizer.param_groups[0]["params"] += list(Body().parameters())
    with pytest.raises(StateError, match="parameters that the model does not have") as caught:
        handler.optimizations["main"].description(handler.module, None)
    assert caught.value.actual == f"4 of them, such as one of shape {(8, X.shape[1])}"
