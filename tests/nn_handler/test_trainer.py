"""The training loop: how it starts, validates, ends and fails."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from shardckpt import NNHandler
from shardckpt.errors import StateError
from shardckpt.nn_handler import Callback, EarlyStopping, ModelCheckpoint
from tests.nn_handler.models import (
    DS,
    Body,
    FailAt,
    NormNet,
    X,
    Y,
    a_handler,
    data,
    make,
    same,
    train,
    weights,
    with_data,
)


def test_unfrozen_parameters_that_no_optimizer_holds_are_named():
    handler = NNHandler(Body, device="cpu")
    handler.freeze_module("body")
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(DS, batch_size=16)
    train(handler)
    handler.freeze_module("body", freeze=False)
    with pytest.warns(UserWarning, match=r"body\.0\.weight"):
        train(handler)


@pytest.mark.parametrize("kind", ["nothing", "generator"])
def test_an_epoch_without_batches_is_an_error(kind):
    handler = make()
    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
    handler.set_train_loader([] if kind == "nothing" else (batch for batch in batches))
    with pytest.raises(StateError, match="gave no batch"):
        train(handler, 2)
    assert handler.epoch == (kind == "generator")


def test_steps_limits_and_validation_by_steps():
    handler = train(make(), None, max_steps=8, validate_every_steps=3)
    assert (handler.step, handler.epoch) == (8, 1)
    assert [found["step"] for found in handler.validations] == [3.0, 6.0]
    handler = train(make(), 2, limit_train_batches=2, limit_val_batches=1)
    assert (handler.step, handler.epoch) == (4, 2)
    handler = make()
    handler.auto_save(save_path="/proc/nowhere")
    assert train(handler, 5, fast_dev_run=True).step == 0  # undone


def test_max_steps_resumes(tmp_path):
    def job(stop, steps=8):
        handler = make()
        handler.add_callback(FailAt(stop))
        handler.auto_save(interval=-1, save_path=tmp_path, resume="auto")
        return train(handler, None, max_steps=steps)

    assert job(0, 0).step == 0
    with pytest.raises(KeyError):
        job(7)
    assert job(0).step == 8
    assert job(0).step == 8
    assert job(0, 15).step == 15  # a script that asks for more


def test_batch_norm_with_an_average_and_a_plateau(tmp_path):
    def job(epochs):
        handler = make(NormNet)
        handler.set_scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
        handler.auto_save(save_path=tmp_path, resume="auto")
        return train(handler, epochs, ema_decay=0.9, use_amp=True)

    job(1)
    assert job(2).epoch == 2


def test_mistakes_in_validation_show_before_training():
    handler = a_handler()
    handler.add_metric("wrong", lambda outputs, targets: 1 / int(handler.model.training))
    with pytest.raises(ZeroDivisionError):
        train(handler)
    assert handler.step == 0
    handler = a_handler()
    once = train(handler, sanity_val_batches=0)
    assert train(a_handler()).history == once.history  # nothing of it is left


def test_an_early_stop_is_the_last_epoch(tmp_path):
    handler = a_handler()
    handler.auto_save(interval=-1, save_path=tmp_path)
    handler.add_callback(EarlyStopping("accuracy", "max", patience=1, min_delta=10.0))
    train(handler, 30)
    assert handler.epoch == 2
    assert os.listdir(tmp_path) == ["epoch2"]
    resumed = a_handler()
    resumed.auto_save(interval=-1, save_path=tmp_path, resume="auto")
    resumed.add_callback(EarlyStopping("accuracy", "max", patience=1, min_delta=10.0))
    train(resumed, 30)
    assert resumed.epoch == 2  # the run that stopped early is not gone on with


class Fails(Callback):
    def __init__(self, epoch: int) -> None:
        self.fails_at = epoch

    def on_epoch_end(self, handler, metrics):
        if handler.epoch == self.fails_at:
            raise RuntimeError("planted")


def test_an_exception_in_a_callback_stops_training_after_a_save(tmp_path):
    handler = a_handler()
    handler.auto_save(interval=-1, save_path=tmp_path)
    handler.add_callback(Fails(2))
    with pytest.raises(RuntimeError, match="planted"):
        train(handler, 5)
    assert os.listdir(tmp_path) == ["step12"]
    loaded = with_data(NNHandler.load(tmp_path / "step12", skip_callbacks=True, confirm=True))
    assert loaded.epoch == 2
    never = train(a_handler(), 3)
    assert same(weights(train(loaded)), weights(never))


def test_a_save_on_an_exception_in_the_data(tmp_path):
    class Breaks(torch.utils.data.Dataset):
        def __len__(self):
            return 48

        def __getitem__(self, index):
            if index == 40:
                raise OSError("planted")
            return data()[index]

    handler = a_handler()
    handler.set_train_loader(Breaks(), batch_size=8)
    handler.auto_save(interval=1, save_path=tmp_path)
    with pytest.raises(OSError, match="planted"):
        train(handler)
    assert os.listdir(tmp_path) == ["step5"]
    never = a_handler()
    never.set_train_loader(data(), batch_size=8)
    train(never)
    loaded = with_data(NNHandler.load(tmp_path / "step5", confirm=True))
    loaded.set_train_loader(data(), batch_size=8)
    assert same(weights(train(loaded)), weights(never))
    assert loaded.history == never.history


class Notes(Callback):
    """Notes the best checkpoint when it is called at the end of an epoch."""

    def __init__(self, name: str, seen: list) -> None:
        self.name, self.seen = name, seen

    def on_epoch_end(self, handler, metrics):
        self.seen.append((self.name, handler.best_path))


def test_checkpoint_callbacks_are_called_after_all_others(tmp_path):
    handler, seen = make(), []
    handler.add_callback(ModelCheckpoint(tmp_path, monitor="loss", mode="min"))
    for name in ("first", "second"):
        handler.add_callback(Notes(name, seen))
    train(handler)
    assert seen == [("first", None), ("second", None)]
    assert os.listdir(tmp_path) == ["best_epoch1"]


class FailsTwice(Callback):
    def on_step_end(self, handler, loss):
        raise ValueError("planted")

    def on_exception(self, handler, error):
        raise KeyError(str(error))


def test_an_error_of_on_exception_is_a_warning_beside_the_first_error():
    handler = make()
    handler.add_callback(FailsTwice())
    with (
        pytest.warns(UserWarning, match=r"FailsTwice\.on_exception raised KeyError\('planted'\)"),
        pytest.raises(ValueError, match="planted"),
    ):
        train(handler)
    assert not handler.trains


def test_validation_runs_when_it_is_due_or_when_a_save_needs_it(tmp_path):
    handler = make()
    train(handler, 5, validate_every=2)
    assert handler.history_epochs["val_loss"] == [2, 4]
    assert "val_loss" not in train(make(), 2, validate_every=0).history
    handler = make()
    handler.auto_save(3, tmp_path, name="e{epoch}_{val_loss:.0f}")
    train(handler, 4, validate_every=2)
    assert handler.history_epochs["val_loss"] == [2, 3, 4]
    assert [name.partition("_")[0] for name in sorted(os.listdir(tmp_path))] == ["e3", "e4"]


def test_a_guard_that_goes_back_needs_checkpoints(tmp_path):
    handler = make()
    with pytest.raises(StateError, match="needs checkpoints to go back to") as caught:
        train(handler, nan_guard="restore")
    assert "auto_save" in caught.value.remedy
    handler.auto_save(None, tmp_path)  # saves on errors and signals alone
    with pytest.raises(StateError, match="needs checkpoints to go back to"):
        train(handler, nan_guard="restore")
    assert handler.step == 0


def test_training_ends_after_the_step_in_which_it_was_asked_to(tmp_path):
    class Ends(Callback):
        def on_step_end(self, handler, loss):
            handler.stop_training = handler.step == 2

    handler = make()
    handler.add_callback(Ends())
    handler.auto_save(save_path=tmp_path)
    with pytest.warns(UserWarning, match=r"callbacks\.0\.class"):
        train(handler, 3)
    assert (handler.epoch, handler.step, handler.history) == (0, 2, {})
    assert os.listdir(tmp_path) == ["step2"]
    handler.callbacks.clear()
    train(handler, 1)  # ends the epoch
    assert (handler.epoch, handler.step, handler.stop_training) == (1, 6, False)
