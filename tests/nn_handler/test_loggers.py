"""The loggers write metrics of epochs and steps."""

from __future__ import annotations

import csv
import io
import os
import sys

import pytest

from shardckpt import NNHandler, errors
from shardckpt.nn_handler import CSVLogger, ExperimentLogger, LogFile, TensorBoardLogger
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
