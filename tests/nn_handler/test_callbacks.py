"""EarlyStopping, ModelCheckpoint and LearningRateMonitor."""

from __future__ import annotations

import os

import pytest

from shardckpt import NNHandler, errors
from shardckpt.nn_handler import CSVLogger, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from tests.nn_handler.models import Count, a_handler, make, train, with_data


def minus_epoch(outputs, targets):
    return float(-Count.epoch)


def test_two_checkpoints_in_one_folder_keep_their_own_best(tmp_path):
    handler = make()
    handler.add_callback(Count())
    handler.add_metric("m", minus_epoch)
    handler.add_callback(ModelCheckpoint(tmp_path, monitor="val_loss"))
    handler.add_callback(ModelCheckpoint(tmp_path, monitor="val_m", mode="max"))
    train(handler, 4)
    by_loss, by_m = (c.saver.best_path for c in handler.callbacks[1:])
    assert (NNHandler.load(by_loss).epoch, NNHandler.load(by_m).epoch) == (4, 1)
    assert handler.best_path == by_loss
    assert handler.best_score == min(handler.history["val_loss"])


def test_each_callback_has_its_own_state_and_arguments(tmp_path):
    handler = a_handler()
    handler.add_callback(EarlyStopping("val_loss", patience=7))
    handler.add_callback(EarlyStopping("accuracy", "max", patience=9, min_delta=0.5))
    handler.add_callback(LearningRateMonitor())
    handler.add_callback(ModelCheckpoint(str(tmp_path / "best"), keep_best=2))
    handler.add_callback(CSVLogger(str(tmp_path / "log.csv")))
    train(handler, 3)
    handler.save(tmp_path / "c")
    resumed = with_data(NNHandler.load(tmp_path / "c", confirm=True))
    one, two, rates, best, log = resumed.callbacks
    assert (one.monitor, one.patience, two.monitor, two.patience) == ("val_loss", 7, "accuracy", 9)
    assert [c.state_dict() for c in resumed.callbacks] == [
        c.state_dict() for c in handler.callbacks
    ]
    assert one.best == min(handler.history["val_loss"])
    assert two.waited == 2
    assert len(rates.rates) == 18
    train(resumed, 2)
    assert len(os.listdir(tmp_path / "best")) == 2  # the list of the best goes on
    assert len(log.rows) == 5
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2", "3", "4", "5"]
    saved = NNHandler.load(tmp_path / "best" / os.listdir(tmp_path / "best")[0])
    assert saved.callbacks[3].best == best.best or saved.epoch < 5
    assert NNHandler.load(tmp_path / "c", skip_callbacks=True).callbacks == []


def test_a_monitor_that_never_appears():
    handler = a_handler()
    handler.add_callback(EarlyStopping("nothing"))
    with pytest.raises(errors.StateError, match="never appears"):
        train(handler)
    assert handler.step == 0


def test_two_checkpoint_callbacks_alike(tmp_path):
    """Two with the same arguments keep a checkpoint each, also when training goes on."""
    handler = a_handler()
    for _ in range(2):
        handler.add_callback(ModelCheckpoint(tmp_path, monitor="loss", mode="max"))
    handler.train(2, progress_bar=False)
    handler.train(2, progress_bar=False)
    epochs = sorted(NNHandler.load(tmp_path / name).epoch for name in os.listdir(tmp_path))
    assert epochs == [1, 1, 4, 4]
