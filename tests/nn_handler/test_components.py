"""The setters of a handler, and the parts of a checkpoint that wait for confirm()."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.errors import StateError
from shardckpt.nn_handler import Callback, CSVLogger, EarlyStopping, ModelCheckpoint
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
