"""EarlyStopping, ModelCheckpoint and LearningRateMonitor."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch

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


def stops_after(stopping: EarlyStopping, values: list[float | None]) -> int | None:
    """Return the epoch after which training ends. None: an epoch without the metric."""
    handler = SimpleNamespace(stop_training=False)
    for epoch, value in enumerate(values, 1):
        stopping.on_epoch_end(handler, {} if value is None else {stopping.monitor: value})
        if handler.stop_training:
            return epoch
    return None


def test_training_stops_after_so_many_epochs_without_an_improvement():
    assert stops_after(EarlyStopping(patience=2), [3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.0]) == 6
    assert stops_after(EarlyStopping(mode="max", patience=1), [1.0, 2.0, 1.0]) == 3
    assert stops_after(EarlyStopping(patience=1), [3.0, 2.0, 1.0]) is None


def test_nan_is_no_improvement_and_an_epoch_without_the_metric_does_not_count():
    assert stops_after(EarlyStopping(patience=2), [math.nan, math.nan]) == 2
    assert stops_after(EarlyStopping(patience=1), [3.0, None, None, 2.0]) is None


def test_an_improvement_is_larger_than_min_delta():
    values = [1.0, 0.75, 0.5]
    assert stops_after(EarlyStopping(patience=1, min_delta=0.25), values) == 2
    assert stops_after(EarlyStopping(patience=1, min_delta=0.125), values) is None


def test_early_stopping_goes_on_with_its_state():
    one = EarlyStopping(patience=2)
    assert stops_after(one, [2.0, 3.0]) is None
    other = EarlyStopping(patience=2)
    other.load_state_dict(one.state_dict())
    assert (other.best, other.waited) == (2.0, 1)
    assert stops_after(other, [2.5]) == 1


@pytest.mark.parametrize(
    "options", [{"patience": 0}, {"patience": 1.0}, {"min_delta": -1}, {"min_delta": math.nan}]
)
def test_wrong_options_of_early_stopping_are_refused(options):
    with pytest.raises(errors.StateError, match="Invalid patience or min_delta") as caught:
        EarlyStopping(**options)
    (item,) = options.items()
    assert f"{item[0]}={item[1]!r}" in caught.value.actual


def test_the_rates_of_all_groups_are_kept_for_each_step():
    handler = SimpleNamespace(
        optimizations={
            "main": SimpleNamespace(rates=[0.1, 0.2]),
            "rest": SimpleNamespace(rates=[0.3]),
        }
    )
    one = LearningRateMonitor()
    one.on_step_end(handler, torch.ones(()))
    handler.optimizations["rest"].rates = [0.5]
    one.on_step_end(handler, torch.ones(()))
    assert one.rates == [[0.1, 0.2, 0.3], [0.1, 0.2, 0.5]]
    other = LearningRateMonitor()
    other.load_state_dict({"rates": [[1, 2]]})
    assert other.state_dict() == {"rates": [[1.0, 2.0]]}


def test_a_checkpoint_callback_notes_the_best_value_before_it_is_confirmed(tmp_path):
    one = ModelCheckpoint(tmp_path / "c", monitor="accuracy", mode="max")
    one.confirmed = False
    one.on_train_start(SimpleNamespace())
    for metrics in ({"accuracy": 0.5}, {"loss": 9.0}, {"accuracy": 0.25}, {"accuracy": math.nan}):
        one.on_epoch_end(SimpleNamespace(), metrics)
    assert one.state_dict() == {"best": 0.5}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("interval", [0, 1.5, True, None])
def test_the_interval_of_a_checkpoint_callback_is_a_number_of_epochs(tmp_path, interval):
    with pytest.raises(errors.StateError, match="Invalid interval") as caught:
        ModelCheckpoint(tmp_path, interval=interval)
    assert caught.value.actual == repr(interval)
