"""The state of a training that a checkpoint holds."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from shardckpt import NNHandler
from shardckpt.errors import StateError
from shardckpt.nn_handler import Callback
from shardckpt.nn_handler.training_state import check_metric_name
from tests.nn_handler.models import Net, NormNet, a_handler, accuracy, make, train


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


@pytest.mark.parametrize("name", ["loss", "epoch", "step", "lr", "val_a", "lr_1"])
def test_names_of_metrics_that_training_uses_are_taken(name):
    with pytest.raises(StateError, match="name of this metric is taken") as caught:
        check_metric_name(name)
    assert caught.value.actual == repr(name)


@pytest.mark.parametrize("name", ["", 3, None])
def test_the_name_of_a_metric_is_text(name):
    with pytest.raises(StateError, match="Invalid name of a metric"):
        check_metric_name(name)
    check_metric_name("loss_of_edges")
    check_metric_name("valid")


def test_a_run_ends_after_the_epochs_and_steps_that_it_adds():
    handler = make()
    handler.epoch, handler.step = 3, 20
    assert handler.begin_run(2, None, resumed=False)[0] == 5
    assert handler.begin_run(None, 7, resumed=False)[1] == 27
    assert (handler.runs, handler.run_steps) == ([3, 3], [20, 20])
    assert not handler.replaying()


def test_the_calls_of_a_resumed_run_end_where_they_would_have_ended():
    """Two calls of train for 2 epochs each; the second one was stopped after an epoch."""
    handler = make()
    handler.runs, handler.run_steps = [0, 2], [0, 12]
    handler.epoch, handler.step, handler.stop_training = 3, 18, True
    assert handler.begin_run(2, 12, resumed=True) == (2, 12)
    assert handler.stop_training  # of the run that goes on
    assert handler.replaying()
    assert handler.begin_run(2, 12, resumed=False) == (4, 24)
    assert not handler.replaying()
    assert handler.begin_run(2, 12, resumed=False) == (5, 30)
    assert not handler.stop_training
    assert handler.runs == [0, 2, 3]


def test_every_group_of_every_optimizer_has_a_rate():
    handler = make()
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.SGD, params="body", groups={"body.0.bias": {"lr": 2.0}}, lr=1)
    handler.set_optimizer(torch.optim.Adam, name="rest", groups={"head.bias": {"lr": 4.0}}, lr=3.0)
    assert handler.rates == {"lr": 1.0, "lr_1": 2.0, "lr_rest": 3.0, "lr_rest_1": 4.0}


def test_evaluation_gives_each_module_its_mode_back():
    handler = make(NormNet)
    handler.module.head.eval()
    with pytest.raises(ValueError, match="planted"), handler.evaluating():
        assert not any(module.training for module in handler.module.modules())
        raise ValueError("planted")
    assert [m.training for m in handler.module.children()] == [True, False]


def test_frozen_modules_stay_in_evaluation_while_training():
    handler = make(NormNet)
    handler.freeze_module("head")
    handler.keep_eval_on_module("body.1")
    handler.train_mode()
    modes = {name: module.training for name, module in handler.module.named_modules()}
    assert not modes.pop("head")
    assert not modes.pop("body.1")
    assert all(modes.values())


def test_parameters_that_no_optimizer_holds_are_untrained():
    handler = make()
    assert handler.untrained() == []
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.SGD, params="head", lr=0.1)
    assert handler.untrained() == ["body.0.weight", "body.0.bias"]
    handler.module.body.requires_grad_(False)
    assert handler.untrained() == []


def test_metrics_of_validation_are_known_only_if_there_is_validation():
    handler = a_handler()
    handler.will_log.add("share")
    every = {"loss", "accuracy", "epoch", "step", "lr", "share"}
    assert handler.metric_names() == every | {"val_loss", "val_accuracy"}
    handler.validates = False
    assert handler.metric_names() == every
    with pytest.raises(StateError, match="never appears") as caught:
        handler.check_monitor("val_loss")
    assert caught.value.actual == "val_loss"


def test_the_terms_of_optimizers_are_known_with_a_step_of_ones_own():
    handler = make()
    handler.optimizations.clear()
    handler.set_optimizer(torch.optim.SGD, params="body", lr=0.1)
    handler.set_optimizer(torch.optim.SGD, name="rest", lr=0.1)
    assert "loss_rest" not in handler.metric_names()
    handler.set_training_step(lambda handler, batch: None)
    assert {"loss", "loss_rest", "val_loss_rest"} <= handler.metric_names()
    assert "loss_main" not in handler.metric_names()


def test_parts_that_a_callback_may_hold_have_names():
    handler = a_handler()
    parts = handler.own_parts()
    assert parts["handler"] is handler
    assert parts["optimizers.main"] is handler.optimizer
    assert parts["schedulers.main"] is handler.scheduler
    assert parts["module.layers.0"] is handler.module.layers[0]
    assert parts["module.head.weight"] is handler.module.head.weight
    assert parts["module.scale"] is handler.module.scale
    assert parts["model"] is parts["module"] is handler.module


class Tied(nn.Module):
    """A loss with the model, and a parameter of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(()))


def test_the_parameters_of_the_model_are_not_those_of_the_loss():
    handler = make()
    assert (handler.loss_module, handler.loss_parameters()) == (None, [])
    handler.loss_fn = loss = Tied(handler.module)
    assert handler.loss_parameters() == [loss.scale]
    assert handler.loss_module is loss
    loss.scale.requires_grad_(False)
    assert handler.loss_module is None


def test_the_state_of_each_callback_has_its_class_and_number():
    class Counts(Callback):
        def state_dict(self):
            return {"n": 3}

    handler = make()
    handler.add_callback(Callback())
    handler.add_callback(Counts())
    assert handler.callback_states() == {
        "0": {"kind": "Callback", "state": {}},
        "1": {"kind": "Counts", "state": {"n": 3}},
    }


def test_without_optimizers_the_state_is_the_model():
    handler = make()
    assert set(handler.tensor_state()) == {"model", "optimizer"}
    handler.set_optimizer(torch.optim.SGD, params="head", lr=0.1)
    handler.set_optimizer(torch.optim.SGD, name="rest", lr=0.1)
    assert set(handler.tensor_state()["optimizers"]) == {"rest"}
    handler.optimizations.clear()
    assert set(handler.tensor_state()) == {"model"}
    handler.set_loss_fn(nn.CrossEntropyLoss(weight=torch.ones(3)))
    assert handler.tensor_state()["loss_fn"] is handler.loss_fn
