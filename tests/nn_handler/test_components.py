"""The setters of a handler, and the parts of a checkpoint that wait for confirm()."""

from __future__ import annotations

import math
import os
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.errors import StateError
from shardckpt.nn_handler import Callback, CSVLogger, EarlyStopping, ModelCheckpoint
from shardckpt.nn_handler.components import check_class, check_compile, check_function
from tests.nn_handler.models import (
    DS,
    Body,
    Net,
    NormNet,
    Scaled,
    a_handler,
    accuracy,
    data,
    make,
    resumed_alike,
    same,
    train,
    weights,
    with_data,
)


@pytest.mark.parametrize("first", ["optimizer", "loss"])
def test_a_loss_with_parameters_is_trained_saved_and_rebuilt(tmp_path, first):
    handler = NNHandler(Body, device="cpu")
    for what in (first, {"optimizer": "loss", "loss": "optimizer"}[first]):
        if what == "loss":
            handler.set_loss_fn(Scaled(4.0))
        else:
            handler.set_optimizer(torch.optim.Adam, lr=0.1)
    handler.set_train_loader(DS, batch_size=16)
    train(handler)
    assert handler.loss_fn.factor != 1.0
    handler.save(tmp_path / "a")
    with shardckpt.open_checkpoint(tmp_path / "a") as checkpoint:
        saved = {name for name in checkpoint.tensors() if name.endswith(".exp_avg")}
    # the names in the state, which are the same under DDP and FSDP2
    places = {f"model.{name}" for name in weights(handler)} | {"loss_fn.factor"}
    assert saved == {f"optimizer.state.{place}.exp_avg" for place in places}
    loaded = NNHandler.load(tmp_path / "a")
    assert loaded.loss_fn.scale == 2.0  # its argument was 4.0
    assert torch.equal(loaded.loss_fn.factor, handler.loss_fn.factor)
    held = [id(p) for group in loaded.optimizer.param_groups for p in group["params"]]
    assert id(loaded.loss_fn.factor) in held


def test_a_model_argument_without_its_name_is_an_error():
    with pytest.raises(StateError, match="by name"):
        NNHandler(Body, "cpu", 32)


@pytest.mark.parametrize(
    "call",
    [
        lambda h: h.set_optimizer(torch.optim.Adam(h.model.parameters())),
        lambda h: h.set_scheduler(torch.optim.lr_scheduler.StepLR(h.optimizer, 1)),
        lambda h: h.set_loss_fn(nn.CrossEntropyLoss),
        lambda h: h.set_loss_fn(None),
        lambda h: h.add_metric("a", nn.L1Loss),
        lambda h: h.add_metric("a", None),
        lambda h: h.set_train_loader(None),
        lambda h: h.set_val_loader(None),
        lambda h: h.set_train_loader(TensorDataset),
        lambda h: NNHandler(Body, 32),
        lambda h: NNHandler(Body, "gpu"),
        lambda h: NNHandler(Body, "cuda:99"),
        lambda h: NNHandler(None),
        lambda h: (h.set_loss_fn(lambda o, t: (o.sum(), 1)), train(h)),
        lambda h: (h.set_loss_fn(lambda o, t: o), train(h)),
        lambda h: h.train(progress_bar=False),
        lambda h: h.train(1, precision="bf61"),
        lambda h: h.log("a", 1),
        lambda h: h.add_metric(3, accuracy),
        lambda h: h.set_optimizer(torch.optim.SGD, lrr=1),
        lambda h: h.set_optimizer(lambda groups: 3),
        lambda h: h.set_scheduler(torch.optim.lr_scheduler.StepLR, stepsize=1),
        lambda h: h.set_scheduler(nn.MSELoss),
        lambda h: h.set_hyperparameters(optimizer="other", lr=1.0),
        lambda h: h.set_train_loader(DS, bath_size=1),
        lambda h: h.set_val_loader(DS, batch_size=0),
        lambda h: h.set_train_loader("data"),
        lambda h: h.seed("3"),
        lambda h: EarlyStopping(patience=0),
        lambda h: (h.module.requires_grad_(False), train(h)),
        lambda h: h.remove_callback(Callback),
    ],
)
def test_a_wrong_argument_is_a_state_error(call):
    with pytest.raises(StateError):
        call(make())


def own_step(handler, batch):
    inputs, targets = batch
    outputs = handler.model(inputs)
    handler.log("size", len(inputs))
    loss = nn.functional.cross_entropy(outputs, targets)
    return {"loss": loss, "outputs": outputs, "targets": targets}


def test_a_training_step_of_ones_own(tmp_path):
    handler, usual = make(), train(make())
    handler.set_training_step(own_step)
    handler.will_log.add("size")
    train(handler)
    assert same(weights(handler), weights(usual))
    assert handler.history["size"] == [16.0]
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    loaded.set_train_loader(DS, batch_size=16)
    with pytest.raises(StateError, match="set_training_step"):
        train(loaded)


def scaled(outputs, targets, scale=1.0, epoch=None):
    factor = scale if epoch is None else scale * (epoch + 1)
    return factor * nn.functional.cross_entropy(outputs, targets)


def test_arguments_of_the_loss_and_the_epoch(tmp_path):
    handler = a_handler()
    handler.set_loss_fn(scaled, scale=2.0, pass_epoch_to_loss=True)
    plain = handler.evaluate(data(15), batch_size=4)["loss"]
    train(handler)
    loaded = resumed_alike(handler, tmp_path / "c")
    assert (loaded.loss_arguments, loaded.passes_epoch) == ({"scale": 2.0}, True)
    handler = a_handler()
    handler.set_loss_fn(scaled)
    assert plain == pytest.approx(2 * handler.evaluate(data(15), batch_size=4)["loss"])


def test_a_module_that_is_kept_in_evaluation(tmp_path):
    handler = NNHandler(NormNet)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.keep_eval_on_module("body.1")
    train(with_data(handler))
    assert handler.module.body[1].num_batches_tracked == 0
    loaded = resumed_alike(handler, tmp_path / "c")
    assert loaded.module.body[1].num_batches_tracked == 0
    assert loaded.module.body[1].weight.requires_grad
    loaded.keep_eval_on_module("body.1", keep=False)
    assert train(loaded).module.body[1].num_batches_tracked > 0
    with pytest.raises(errors.StateError, match="no such module"):
        loaded.keep_eval_on_module("neck")


@pytest.mark.parametrize(
    "act",
    [
        lambda h: h.train(1, ema_decay=1.0),
        lambda h: h.train(1, gradient_clipping_norm=-1),
        lambda h: h.train(1.5),
        lambda h: h.add_metric("val_loss", accuracy),
        lambda h: h.add_callback(EarlyStopping),
        lambda h: h.add_callback(3),
        lambda h: h.freeze_module("nothing"),
        lambda h: h.set_model(Net),
        lambda h: h.set_scheduler(torch.optim.lr_scheduler.StepLR, step_size=1, interval="day"),
        lambda h: h.save_single_file("c.bin"),
        lambda h: h.save_multi_files("c", "pickle"),
        lambda h: EarlyStopping(mode="best"),
    ],
)
def test_bad_calls_are_refused(act):
    with pytest.raises(errors.StateError):
        act(a_handler())


def test_frozen_modules_stay_as_they_are(tmp_path):
    torch.manual_seed(0)
    handler = NNHandler(NormNet)
    handler.freeze_module("body")
    handler.set_optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    with_data(handler)
    before = weights(handler)
    train(handler)
    after = weights(handler)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}  # running statistics neither
    handler.save(tmp_path / "c")
    loaded = with_data(NNHandler.load(tmp_path / "c"))
    train(loaded)
    train(handler)
    assert same(weights(loaded), weights(handler))
    handler.freeze_module("body", freeze=False)
    assert all(p.requires_grad for p in handler.module.parameters())


class Remembers(Callback):
    writes_files = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, handler):
        if self.confirmed:
            Path(self.path).touch()


def test_what_came_with_a_checkpoint_writes_nothing_before_it_is_confirmed(tmp_path):
    out = tmp_path / "out"
    handler = a_handler()
    handler.auto_save(save_path=out / "auto", overwrite=True)
    for callback in (
        ModelCheckpoint(out / "best"),
        CSVLogger(out / "log.csv"),
        Remembers(out / "mark"),
    ):
        handler.add_callback(callback)
    handler.compile_model(backend="eager")
    handler.save(tmp_path / "c")
    loaded = with_data(NNHandler.load(tmp_path / "c"))
    assert len(loaded.unconfirmed) == 5
    with pytest.warns(UserWarning, match="until you confirm"):
        loaded.train(1, progress_bar=False)
    loaded.train(1, progress_bar=False)  # warned of once
    assert not out.exists()
    out.mkdir()
    loaded.confirm()
    assert loaded.unconfirmed == []
    loaded.train(1, progress_bar=False)
    assert sorted(os.listdir(out)) == ["auto", "best", "log.csv", "mark"]
    assert (out / "log.csv").read_text().count("\n") == 4  # the rows of before are not lost


def test_an_instance_in_place_of_a_class_is_named():
    scheduler = torch.optim.lr_scheduler
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(StateError, match="class of the optimizer was expected") as caught:
        check_class(optimizer, torch.optim.Optimizer, "optimizer", "torch.optim.Adam, lr=0.1")
    assert caught.value.actual == "an instance of SGD"
    assert caught.value.remedy == "give the class: set_optimizer(SGD, ...)"
    with pytest.raises(StateError, match="class of the scheduler was expected") as caught:
        check_class(3, scheduler.LRScheduler, "scheduler", "StepLR, step_size=10")
    assert caught.value.remedy == "give the class itself"
    check_class(scheduler.StepLR, scheduler.LRScheduler, "scheduler", "StepLR, step_size=10")


def test_a_class_in_place_of_a_function_is_named():
    with pytest.raises(StateError, match="loss must be an instance or a function") as caught:
        check_function(nn.L1Loss, "loss", "set_loss_fn(nn.CrossEntropyLoss())")
    assert caught.value.actual == "the class L1Loss"
    assert caught.value.remedy == "create an instance: L1Loss(...)"
    with pytest.raises(StateError) as caught:
        check_function(3, "metric", "add_metric('a', metric)")
    assert (caught.value.actual, caught.value.remedy) == ("3", None)
    check_function(types.SimpleNamespace(update=print), "metric", "")  # as torchmetrics have


@pytest.mark.parametrize(
    ("options", "actual"),
    [
        ({"backend": "mine"}, "backend='mine'"),
        ({"backend": "eager", "options": {"cpp.cxx": ["sh"]}}, "options={'cpp.cxx': ['sh']}"),
        ({"mode": 3}, "mode=3"),
        ({"fullgraph": None}, "fullgraph=None"),
    ],
)
def test_a_checkpoint_chooses_only_harmless_options_of_compilation(options, actual):
    with pytest.raises(StateError, match="may not choose this option") as caught:
        check_compile(options)
    assert caught.value.actual == actual
    check_compile({"backend": "eager", "mode": None, "dynamic": None, "fullgraph": True})


def test_an_error_of_a_constructor_is_told_with_its_class():
    handler = make()
    with pytest.raises(StateError, match="optimizer does not take these arguments") as caught:
        handler.set_optimizer(torch.optim.SGD, lrr=1)
    assert caught.value.expected == "the arguments of SGD"
    assert "lrr" in caught.value.actual
    with pytest.raises(StateError, match="optimizer does not take these arguments") as caught:
        handler.set_optimizer(torch.optim.SGD, lr=-1)
    assert caught.value.actual == "ValueError: Invalid learning rate: -1"
    with pytest.raises(StateError, match="made something else") as caught:
        handler.set_optimizer(lambda groups: 3)
    assert caught.value.actual == "int"
    assert handler.optimizer.param_groups[0]["lr"] == 0.1  # as before


@pytest.mark.parametrize("name", ["a.b", "", 3, "a b"])
def test_the_name_of_an_optimizer_is_a_word(name):
    with pytest.raises(StateError, match="Invalid name of an optimizer") as caught:
        make().set_optimizer(torch.optim.SGD, name=name, lr=0.1)
    assert caught.value.actual == repr(name)


def test_the_model_is_changed_before_the_optimizer_is_set():
    handler = NNHandler(Body, device="cpu")
    handler.freeze_module("body")
    handler.compile_model(backend="eager")
    handler.set_model(Body, width=3)
    assert handler.module.head.in_features == 3
    assert (handler.frozen, handler.compiling) == ([], None)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(StateError, match="holds the parameters of the current model"):
        handler.set_model(Body)
    with pytest.raises(StateError, match="where its class was expected") as caught:
        NNHandler(Body(), device="cpu")
    assert caught.value.actual == "Body"
    with pytest.raises(StateError, match="class is not callable") as caught:
        NNHandler("Body", device="cpu")
    assert caught.value.actual == "'Body'"


def test_a_metric_of_a_whole_epoch_is_a_function():
    handler = make()
    counts = types.SimpleNamespace(update=print)
    with pytest.raises(StateError, match="whole_epoch=True needs a function") as caught:
        handler.add_metric("seen", counts, whole_epoch=True)
    assert caught.value.actual == "SimpleNamespace"
    handler.add_metric("f1", accuracy, whole_epoch=True)
    handler.add_metric("f1", accuracy)
    assert handler.whole_epoch == []


def test_a_callback_that_is_not_there_can_not_be_removed():
    handler = make()
    with pytest.raises(StateError, match="does not have this callback") as caught:
        handler.remove_callback(EarlyStopping)
    assert caught.value.expected == "no callback"
    one, other = EarlyStopping("loss"), EarlyStopping("loss")
    handler.add_callback(one)
    with pytest.raises(StateError, match="does not have this callback"):
        handler.remove_callback(other)
    assert handler.callbacks == [one]


def test_a_module_is_frozen_and_kept_in_evaluation_once():
    handler = make()
    for _ in range(2):
        handler.freeze_module("body")
        handler.keep_eval_on_module("body.0")
    assert (handler.frozen, handler.kept_eval) == (["body"], ["body.0"])
    handler.keep_eval_on_module("body.0", keep=False)
    assert handler.kept_eval == []
    with pytest.raises(StateError, match="no such module") as caught:
        handler.freeze_module("neck")
    assert caught.value.expected == "body, body.0, body.1, head"


@pytest.mark.parametrize("seed", [1.0, True, None, 1 << 63, -(1 << 63) - 1])
def test_a_seed_is_an_int_of_64_bits(seed):
    handler = make()
    with pytest.raises(StateError, match="Invalid seed"):
        handler.seed(seed)
    assert handler.seed_value == 0
    handler.seed(-3)
    first = torch.rand(2)
    handler.seed(-3)
    assert torch.equal(torch.rand(2), first)


def test_hyperparameters_are_kept_for_each_optimizer():
    handler = make()
    handler.set_hyperparameters(lr=0.5)
    handler.set_hyperparameters(momentum=0.25)
    assert handler.hyperparameters == {"main": {"lr": 0.5, "momentum": 0.25}}
    assert handler.rates == {"lr": 0.5}
    with pytest.raises(StateError, match="no optimizer of this name") as caught:
        handler.set_hyperparameters(optimizer="rest", lr=0.1)
    assert (caught.value.expected, caught.value.actual) == ("main", "'rest'")
    for wrong in ({"betas": (0, 1)}, {"lr": -math.inf}):
        with pytest.raises(StateError):
            handler.set_hyperparameters(**wrong)
    assert handler.hyperparameters["main"] == {"lr": 0.5, "momentum": 0.25}


def test_a_proposed_saver_begins_to_save_when_it_is_confirmed(tmp_path):
    handler = make()
    options = {"save_path": str(tmp_path), "every_steps": 3, "resume": "auto"}
    handler.propose("auto_saver", options)
    assert handler.unconfirmed == [f"auto_saver: {options}"]
    assert handler.auto_saver is None
    handler.confirm()
    assert handler.unconfirmed == []
    assert handler.auto_saver.schedule.every_steps == 3
    assert handler.auto_saver.options["resume"] is None  # the load has resumed already
    with pytest.raises(StateError, match="Invalid every_steps"):
        handler.propose("auto_saver", {**options, "every_steps": 0})
    with pytest.raises(StateError, match="may not choose"):
        handler.propose("compile", {"backend": "mine"})
    assert handler.unconfirmed == []


def test_a_new_loss_replaces_the_parameters_of_the_former_in_the_optimizer():
    handler = make()
    handler.set_loss_fn(Scaled(1.0))
    first = handler.loss_fn.factor
    handler.set_loss_fn(Scaled(2.0))
    held = {id(p) for group in handler.optimizer.param_groups for p in group["params"]}
    assert id(first) not in held
    assert id(handler.loss_fn.factor) in held
    handler.set_loss_fn(nn.CrossEntropyLoss())
    count = sum(len(group["params"]) for group in handler.optimizer.param_groups)
    assert count == len(list(handler.module.parameters()))
