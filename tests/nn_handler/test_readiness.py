"""A handler that can not train, or that differs by rank, is an error before training."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn

from shardckpt import NNHandler, errors
from shardckpt.errors import StateError
from shardckpt.nn_handler import Callback, EarlyStopping, readiness
from shardckpt.nn_handler.readiness import check_on_all
from shardckpt.nn_handler.train_options import TrainOptions
from tests.nn_handler.models import Net, a_handler, data, make, train


class NotSaved(Callback):
    def state_dict(self):
        return {"function": lambda: 1}


def plateau_without_validation() -> NNHandler:
    handler = NNHandler(Net)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau)
    handler.set_loss_fn(nn.CrossEntropyLoss())
    handler.set_train_loader(data(), batch_size=8)
    return handler


def with_callback(callback: Callback) -> NNHandler:
    handler = a_handler()
    handler.add_callback(callback)
    return handler


def saving_into(folder) -> NNHandler:
    handler = a_handler()
    handler.auto_save(save_path=folder)
    return handler


@pytest.mark.parametrize(
    ("act", "kind", "text"),
    [
        (lambda p: NNHandler(Net()), errors.StateError, "class was expected"),
        (lambda p: a_handler().set_train_loader(data(0)), errors.StateError, "no batch"),
        (
            lambda p: a_handler().set_train_loader(data(5), batch_size=8, drop_last=True),
            errors.StateError,
            "no batch",
        ),
        (
            lambda p: a_handler().set_val_loader(data(0)),
            errors.StateError,
            "validation set is empty",
        ),
        (lambda p: plateau_without_validation().train(1), errors.StateError, "never appears"),
        (
            lambda p: with_callback(EarlyStopping()).train(1, validate_every=0),
            errors.StateError,
            "never appears",
        ),
        (
            lambda p: with_callback(NotSaved()).train(1),
            errors.UnsupportedLeafError,
            "can't be saved",
        ),
        (lambda p: saving_into(p / "file" / "x").train(1), errors.StorageError, "refused"),
    ],
)
def test_wrong_input_is_an_error_before_training(tmp_path, act, kind, text):
    (tmp_path / "file").touch()
    with pytest.raises(kind, match=text):
        act(tmp_path)


def test_training_inside_ema_weights_is_refused():
    handler = train(make(), ema_decay=0.9)
    with handler.ema_weights(), pytest.raises(StateError, match="ema_weights"):
        train(handler)
    train(handler)


def test_training_needs_its_parts():
    with pytest.raises(errors.StateError) as caught:
        NNHandler(Net).train(epochs=1)
    assert "set_optimizer" in caught.value.remedy


OPTIONS = TrainOptions(epochs=1)


def test_a_handler_that_is_complete_can_train():
    check_on_all(a_handler(), OPTIONS)


def test_the_missing_part_is_named():
    handler = NNHandler(Net)
    with pytest.raises(StateError, match="can't train yet") as caught:
        check_on_all(handler, OPTIONS)
    assert caught.value.remedy == "call set_optimizer first"
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(StateError, match="can't train yet") as caught:
        check_on_all(handler, OPTIONS)
    assert caught.value.remedy == "call set_train_loader first"


def test_parts_that_a_load_left_open_are_asked_for():
    handler = a_handler()
    handler.await_part("metrics.f1", "lambda", None)
    handler.await_part("own_step", "a step", None)
    with pytest.raises(StateError, match="could not resolve") as caught:
        check_on_all(handler, OPTIONS)
    assert caught.value.expected == "metrics.f1: lambda, own_step: a step"
    assert "add_metric('f1', ...), set_training_step(...)" in caught.value.remedy


def outline(handler: NNHandler, **options) -> bytes:
    return msgspec.msgpack.encode(
        readiness._outline(handler, TrainOptions(**{"epochs": 1, **options}))
    )


def test_the_rank_that_prepares_other_training_is_named():
    """The outlines of three handlers, as ranks send them to rank 0."""
    own = outline(a_handler())
    assert readiness._check_alike([own, outline(a_handler(), progress_bar=False), own]) == b""
    other = a_handler()
    other.add_callback(EarlyStopping())
    with pytest.raises(StateError, match="differently: add_callback") as caught:
        readiness._check_alike([own, own, outline(other)])
    assert caught.value.rank == 2
    assert caught.value.expected == "[], as on rank 0"
    assert caught.value.actual == "['EarlyStopping']"
    with pytest.raises(StateError, match=r"differently: train\(epochs=\)"):
        readiness._check_alike([own, outline(a_handler(), epochs=2)])
    without = a_handler()
    without.val_data = None
    with pytest.raises(StateError, match="differently: set_val_loader"):
        readiness._check_alike([own, outline(without)])
    saving = a_handler()
    saving.auto_save(save_path="runs")
    with pytest.raises(StateError, match="differently: auto_save"):
        readiness._check_alike([own, outline(saving)])
