"""A handler is created from a checkpoint, or filled from one."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.nn_handler import Callback, EarlyStopping, loading
from shardckpt.nn_handler.handler_source import open_handler
from shardckpt.nn_handler.loading import HandlerLoadOptions, restore, restore_tensors
from shardckpt.nn_handler.saved import Sums
from tests.nn_handler.models import (
    DS,
    Body,
    Net,
    X,
    Y,
    a_handler,
    make,
    number,
    same,
    train,
    weights,
)


def frozen_by_module(handler):
    handler.freeze_module("body")


def frozen_by_hand(handler):
    handler.module.body.requires_grad_(False)


def one_frozen_by_hand(handler):
    handler.module.body[0].bias.requires_grad = False


@pytest.mark.parametrize("freeze", [frozen_by_module, frozen_by_hand, one_frozen_by_hand])
@pytest.mark.parametrize("unfreeze", [False, True])
def test_what_is_frozen_comes_back(tmp_path, freeze, unfreeze):
    handler = NNHandler(Body, device="cpu")
    freeze(handler)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(DS, batch_size=16)
    train(handler)
    if unfreeze:
        handler.module.requires_grad_(True)
    handler.save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    flags = [p.requires_grad for p in loaded.module.parameters()]
    assert flags == [p.requires_grad for p in handler.module.parameters()]
    assert len(loaded.optimizer.param_groups[0]["params"]) == len(
        handler.optimizer.param_groups[0]["params"]
    )


class Unfreeze(Callback):
    def __init__(self, how: str) -> None:
        self.how = how

    def on_epoch_start(self, handler):
        if handler.epoch == 1:
            handler.freeze_module("body", freeze=False)
            if self.how == "anew":
                handler.set_optimizer(torch.optim.SGD, lr=0.1)
            else:
                body = handler.module.body.parameters()
                handler.optimizer.add_param_group({"params": list(body), "lr": 0.01})


@pytest.mark.parametrize("how", ["anew", "group"])
def test_gradual_unfreezing_resumes(tmp_path, how):
    def job(folder, epochs):
        torch.manual_seed(0)
        handler = NNHandler(Body, device="cpu")
        handler.freeze_module("body")
        handler.set_optimizer(torch.optim.SGD, lr=0.1)
        handler.set_loss_fn(nn.CrossEntropyLoss())
        handler.set_train_loader(DS, batch_size=16)
        handler.add_callback(Unfreeze(how))
        handler.auto_save(interval=1, save_path=folder, resume="auto")
        return train(handler, epochs)

    job(tmp_path / "a", 2)
    resumed, never = job(tmp_path / "a", 3), job(tmp_path / "b", 3)
    assert resumed.epoch == 3
    assert same(weights(resumed), weights(never))
    assert len(resumed.optimizer.param_groups) == len(never.optimizer.param_groups)


def test_the_dtype_of_a_model_comes_back(tmp_path):
    handler = make()
    handler.model.double()
    handler.set_train_loader(TensorDataset(X.double(), Y), batch_size=16)
    handler.val_data = None
    train(handler, ema_decay=0.9).save(tmp_path / "a")
    loaded = NNHandler.load(tmp_path / "a")
    assert loaded.module.head.weight.dtype == torch.float64
    assert same(weights(loaded), weights(handler))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LazyLinear(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_lazy_model(tmp_path):
    handler = make(Lazy)
    handler.val_data = None
    train(handler).save(tmp_path / "a")
    assert same(weights(NNHandler.load(tmp_path / "a")), weights(handler))


def test_parts_that_are_skipped_are_not_loaded(tmp_path):
    train(a_handler(), 2).save(tmp_path / "c")
    assert NNHandler.load(tmp_path / "c", skip_optimizer=True).optimizer is None
    alone = NNHandler.load(tmp_path / "c", skip_scheduler=True, skip_history=True)
    assert (alone.scheduler, alone.history) == (None, {})
    assert alone.optimizer.state


def test_other_callbacks_are_no_reason_to_fall_back(tmp_path):
    for epochs in (1, 2):
        handler = a_handler()
        handler.auto_save(save_path=tmp_path, resume="auto")
        if epochs == 2:
            handler.add_callback(EarlyStopping())
            with pytest.raises(errors.LoadMismatchError, match="other callbacks"):
                handler.train(epochs, progress_bar=False)
        else:
            handler.train(epochs, progress_bar=False)


@pytest.mark.parametrize("at", ["modell.class", "callbacks.3", "optimizer.options.nothing", "loss"])
def test_what_is_given_for_nothing(tmp_path, at):
    a_handler().save(tmp_path / "c")
    with pytest.raises(errors.StateError, match="does not have"):
        NNHandler.load(tmp_path / "c", objects={at: number})


def test_an_instance_is_no_model_class(tmp_path):
    a_handler().save(tmp_path / "c")
    with pytest.raises(errors.StateError, match="class was expected"):
        NNHandler.load(tmp_path / "c", model_class=Net())


class Property(nn.Linear):
    @property
    def part(self):
        raise AssertionError("a property of the model was read")


def test_the_names_of_frozen_modules_are_data(tmp_path):
    state = NNHandler(Property, in_features=2, out_features=2).state()
    state["config"]["frozen"] = ["part"]
    shardckpt.save(state, tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match="frozen"):
        NNHandler.load(tmp_path / "c")


class Weighted(nn.Module):
    """A loss that has a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, outputs, targets):
        return functional.cross_entropy(outputs, targets) * self.scale


def test_the_tensors_of_a_loss_wait_for_it(tmp_path, untrusted):
    class Local(Weighted):
        pass

    handler = a_handler()
    handler.set_loss_fn(Local())
    handler.loss_fn.scale.fill_(7.0)
    with pytest.warns(UserWarning, match="loss_fn"):
        handler.save(tmp_path / "c")
    with pytest.warns(UserWarning, match="loss_fn"):
        NNHandler.load(tmp_path / "c").save(tmp_path / "again")
    loaded = NNHandler.load(tmp_path / "again")
    loaded.set_loss_fn(Local())
    assert loaded.loss_fn.scale == 7.0


def test_a_part_of_a_checkpoint_can_be_left_out(tmp_path):
    state = a_handler().state()
    state["config"] |= {"auto_saver": {"x": 1}, "compile": {"options": {"cpp.cxx": ["sh"]}}}
    shardckpt.save(state, tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match="auto_saver") as caught:
        NNHandler.load(tmp_path / "c")
    assert 'objects={"auto_saver": None}' in caught.value.remedy
    left_out = {"auto_saver": None}
    with pytest.raises(errors.CheckpointError, match="compile"):
        NNHandler.load(tmp_path / "c", objects=left_out)
    loaded = NNHandler.load(tmp_path / "c", objects={**left_out, "compile": None})
    assert loaded.unconfirmed == []


def options(**changed) -> HandlerLoadOptions:
    """The options of NNHandler.load, as they are by default but for some."""
    parameters = dict(inspect.signature(NNHandler.load).parameters)
    del parameters["path"]
    return HandlerLoadOptions(**{n: p.default for n, p in parameters.items()} | changed)


def test_a_load_takes_all_parts_but_those_to_skip():
    parts = {"optimizer", "scheduler", "history", "callbacks", "ema"}

    def left_out(**changed) -> set[str]:
        return {part for part in parts if not options(**changed).takes(part)}

    assert left_out() == set()
    assert left_out(skip_optimizer=True) == {"optimizer", "scheduler"}
    assert left_out(skip_scheduler=True, skip_ema=True) == {"scheduler", "ema"}
    assert left_out(device_map="cpu", skip_history=True) == {"optimizer", "scheduler", "history"}
    assert options(device_map="cpu").placed


def test_objects_are_given_by_their_place():
    given = options(
        objects={"a.b": 1, "loss_fn": 2}, loss_fn=number, metrics={"f1": number}, model_class=Net
    ).given
    assert given == {"a.b": 1, "loss_fn": number, "metrics.f1": number, "model.class": Net}
    assert options().given == {}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"objects": [1]}, "Invalid objects for load"),
        ({"metrics": number}, "Invalid metrics for load"),
        ({"model_class": "Net"}, "model's class is not callable"),
    ],
)
def test_objects_of_other_types_are_refused(changed, text):
    with pytest.raises(errors.StateError, match=text) as caught:
        _ = options(**changed).given
    assert caught.value.actual == repr(next(iter(changed.values())))


def test_going_back_loads_tensors_and_leaves_the_rates(tmp_path):
    handler = train(make(), ema_decay=0.5)
    handler.save(tmp_path / "c")
    own, average = weights(handler), dict(handler.ema.weights)
    average = {name: tensor.clone() for name, tensor in average.items()}
    train(handler)
    handler.optimizer.param_groups[0]["lr"] = 0.25
    restore_tensors(handler, open_handler(str(tmp_path / "c")))
    assert same(weights(handler), own)
    assert same(handler.ema.weights, average)
    assert handler.optimizer.param_groups[0]["lr"] == 0.25
    assert (handler.epoch, handler.step) == (2, 12)


def test_a_restore_replaces_the_progress_and_drops_what_the_checkpoint_lacks(tmp_path):
    handler = train(make(), 2)
    handler.save(tmp_path / "c")
    other = train(make(), 3)
    source = open_handler(str(tmp_path / "c"))
    restore(other, source)
    assert (other.epoch, other.step, other.history) == (2, 12, handler.history)
    assert (other.run_id, other.runs, other.rates) == (handler.run_id, [0], {"lr": 0.1})
    assert same(weights(other), weights(handler))
    restore(other, source, skip={"history"})
    assert (other.history, other.history_epochs) == ({}, {})


def test_rank_0_gets_the_sums_of_all_ranks():
    every = [
        Sums(sums={"loss": 2.0, "ce": 1.0}, counts={"loss": 4, "ce": 2}),
        Sums(sums={"loss": 3.0}, count=5),  # of a checkpoint of 0.1
    ]
    found = loading._added(every, times=1)
    assert (found.sums, found.counts) == ({"loss": 5.0, "ce": 1.0}, {"loss": 9, "ce": 2})
    others = loading._added(every, times=0)
    assert (others.sums, others.counts) == ({"loss": 0.0, "ce": 0.0}, {"loss": 0, "ce": 0})
    assert loading._added([*every, None], times=1) is None


def test_batches_of_whole_epochs_are_joined_and_other_metrics_start_again():
    batches = [{"outputs": torch.ones(n), "targets": torch.zeros(n)} for n in (1, 2)]
    other = {"total": torch.tensor(3.0)}
    every = [
        Sums(sums={}, metrics={"f1": batches[0], "seen": other}),
        Sums(sums={}, metrics={"f1": batches[1], "seen": other, "none": {}}),
    ]
    with pytest.warns(UserWarning, match="'seen' starts again within the epoch"):
        found = loading._joined_metrics(every)
    assert list(found) == ["f1"]
    assert (len(found["f1"]["outputs"]), len(found["f1"]["targets"])) == (3, 3)


def test_a_checkpoint_holds_the_state_of_a_rank_at_least():
    handler = make()
    with pytest.raises(errors.CheckpointError, match="no rank's state") as caught:
        loading._restore_rank_values(handler, {"every": []}, "c")
    assert caught.value.tensor == "ranks"
    with pytest.raises(errors.CheckpointError, match="malformed"):
        loading._restore_rank_values(handler, {"every": [3]}, "c")
