"""The loggers write metrics of epochs and steps."""

from __future__ import annotations

import csv
import io
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from shardckpt import NNHandler, errors
from shardckpt.nn_handler import CSVLogger, ExperimentLogger, LogFile, TensorBoardLogger
from shardckpt.nn_handler.loggers import as_text
from tests.nn_handler.models import a_handler, train, with_data


def test_loggers_by_step_and_epoch(tmp_path):
    class Tracker:
        def __init__(self) -> None:
            self.logged = []

        def log(self, metrics, step):
            self.logged.append((step, set(metrics)))

    tracker = Tracker()
    handler = a_handler()
    handler.add_callback(CSVLogger(tmp_path / "log.csv", every_steps=2))
    handler.add_callback(TensorBoardLogger(tmp_path / "board", every_steps=3))
    handler.add_callback(LogFile(tmp_path / "train.log", every_steps=3))
    handler.add_callback(ExperimentLogger(tracker, every_steps=4))
    train(handler, 2)
    assert [step for step, _ in tracker.logged] == [4, 6, 8, 12, 12]
    assert tracker.logged[0][1] == {"epoch", "step/loss", "step/lr"}
    assert "val_accuracy" in tracker.logged[1][1]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "log.steps.csv").read_text())))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    text = (tmp_path / "train.log").read_text()
    assert text.count("val_loss") == 2
    assert "training ends" in text
    assert os.listdir(tmp_path / "board")
    with pytest.warns(UserWarning, match=r"callbacks\.3\.args\.0"):
        handler.save(tmp_path / "c")
    given = {"callbacks.3.args.0": tracker}
    loaded = with_data(NNHandler.load(tmp_path / "c", objects=given, confirm=True))
    train(loaded)
    assert tracker.logged[-1][0] == 18
    rows = list(csv.DictReader(io.StringIO((tmp_path / "log.steps.csv").read_text())))
    assert [int(row["step"]) for row in rows] == list(range(2, 19, 2))
    with pytest.raises(errors.StateError, match="log_metrics"):
        ExperimentLogger(object())


def test_metrics_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    handler = a_handler()
    handler.add_callback(TensorBoardLogger(tmp_path / "log"))
    train(handler, 2)
    handler.save(tmp_path / "c")
    train(handler, 1)  # is trained again, by a resume
    resumed = with_data(NNHandler.load(tmp_path / "c", confirm=True))
    train(resumed, 2)
    log = EventAccumulator(str(tmp_path / "log"))
    log.Reload()
    assert set(log.Tags()["scalars"]) == set(resumed.history)
    for name, values in resumed.history.items():
        found = [(event.step, event.value) for event in log.Scalars(name)]
        assert found == [(epoch, pytest.approx(v)) for epoch, v in enumerate(values, 1)]


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    handler = a_handler()
    handler.add_callback(TensorBoardLogger(tmp_path))
    with pytest.raises(errors.DependencyError, match="extra"):
        train(handler)


def at(step: int = 0, epoch: int = 0, rank: int = 0, **rates: float) -> SimpleNamespace:
    """A handler at this position."""
    return SimpleNamespace(step=step, epoch=epoch, rank=rank, rates=rates or {"lr": 0.5})


@pytest.mark.parametrize("every_steps", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger, LogFile])
def test_the_number_of_steps_is_an_int_from_1(tmp_path, logger, every_steps):
    with pytest.raises(errors.StateError, match="Invalid every_steps") as caught:
        logger(tmp_path / "log", every_steps=every_steps)
    assert caught.value.actual == repr(every_steps)


def test_metrics_are_one_line_of_text():
    assert as_text({"loss": 0.123456, "epoch": 3, "large": 123456.0}) == (
        "loss 0.1235  epoch 3  large 1.235e+05"
    )
    assert as_text({}) == ""


def test_a_table_has_the_columns_of_all_rows(tmp_path):
    logger = CSVLogger(tmp_path / "log.csv")
    logger.on_epoch_end(at(6, 1), {"loss": 2.0})
    logger.on_epoch_end(at(12, 2), {"loss": 1.0, "val_loss": 3.0})
    text = (tmp_path / "log.csv").read_text()
    assert text.splitlines() == ["epoch,step,loss,val_loss", "1,6,2.0,", "2,12,1.0,3.0"]


def test_the_rows_of_steps_after_the_resumed_one_are_replaced(tmp_path):
    logger = CSVLogger(tmp_path / "log.csv", every_steps=2)
    for step in range(1, 9):
        logger.on_step_end(at(step), torch.tensor(float(step)))
    logger.on_train_end(at(8))
    again = CSVLogger(tmp_path / "log.csv", every_steps=2)
    again.on_train_start(at(5))
    again.on_step_end(at(6), torch.tensor(60.0))
    again.on_exception(at(6), ValueError())
    with open(logger.steps_path) as file:
        rows = [(row["step"], row["loss"], row["lr"]) for row in csv.DictReader(file)]
    assert rows == [("2", "2.0", "0.5"), ("4", "4.0", "0.5"), ("6", "60.0", "0.5")]
    assert logger.steps_path == str(tmp_path / "log.steps.csv")


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger, LogFile])
@pytest.mark.parametrize(("rank", "confirmed"), [(1, True), (0, False)])
def test_one_rank_writes_after_it_is_confirmed(tmp_path, logger, rank, confirmed):
    one = logger(tmp_path / "log", every_steps=1)
    one.confirmed = confirmed
    handler = at(1, 1, rank)
    one.on_train_start(handler)
    one.on_step_end(handler, torch.tensor(1.0))
    one.on_epoch_end(handler, {"loss": 1.0})
    one.on_exception(handler, ValueError())
    one.on_train_end(handler)
    assert os.listdir(tmp_path) == []


def test_a_log_file_has_a_line_for_each_event(tmp_path):
    log = LogFile(tmp_path / "new" / "log")
    handler = at(6, 1)
    log.on_epoch_end(handler, {"loss": 2.0})
    log.on_save(handler, "runs/epoch1")
    log.on_save_failed(handler, "runs/epoch2", OSError("full\nsecond line"))
    log.on_exception(handler, KeyError("planted"))
    log.on_train_end(handler)
    lines = (tmp_path / "new" / "log").read_text().splitlines()
    assert [line.partition("  step 6  ")[2] for line in lines] == [
        "loss 2",
        "saved runs/epoch1",
        "not saved: runs/epoch2: full",
        "ended by KeyError: 'planted'",
        "training ends",
    ]
    assert all("  epoch 1  " in line for line in lines)


class Client:
    """As MLflow: it has a log_metrics besides another log."""

    def __init__(self) -> None:
        self.logged = []

    def log(self, text):
        raise AssertionError

    def log_metrics(self, metrics, step):
        self.logged.append((metrics, step))


def test_a_tracker_gets_steps_under_names_of_their_own():
    client = Client()
    logger = ExperimentLogger(client, every_steps=2)
    logger.confirmed = False  # it writes no file of the checkpoint's choice
    for step in (1, 2):
        logger.on_step_end(at(step), torch.tensor(3.0))
    logger.on_epoch_end(at(2, 1), {"loss": 3.0})
    logger.on_epoch_end(at(2, 1, rank=1), {"loss": 3.0})
    assert client.logged == [
        ({"epoch": 0, "step/loss": 3.0, "step/lr": 0.5}, 2),
        ({"epoch": 1, "loss": 3.0}, 2),
    ]
    with pytest.raises(errors.StateError, match="needs an experiment tracker") as caught:
        ExperimentLogger(SimpleNamespace(log=3))
    assert caught.value.actual == "SimpleNamespace"
