"""Plots of the history."""

from __future__ import annotations

import os
import sys

import pytest

from shardckpt import NNHandler, errors
from shardckpt.nn_handler.plots import plot
from tests.nn_handler.models import a_handler, train


def test_plots_show_each_metric_by_epoch(tmp_path):
    handler = train(a_handler(), 4, validate_every=2)
    assert handler.history_epochs["val_loss"] == [2, 4]
    figure = handler.plot_history(tmp_path / "all.png")
    assert [axis.get_title() for axis in figure.axes] == ["loss", "accuracy", "lr"]
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines == {"training": [1, 2, 3, 4], "validation": [2, 4]}
    assert handler.plot_losses(tmp_path / "loss.svg").axes[0].get_title() == "loss"
    assert sorted(os.listdir(tmp_path)) == ["all.png", "loss.svg"]
    with pytest.raises(errors.StateError, match="no such metric"):
        handler.plot_history(names=["nothing"])
    handler.save(tmp_path / "c")
    assert NNHandler.load(tmp_path / "c").history_epochs == handler.history_epochs


def test_a_metric_of_validation_alone_is_plotted():
    pytest.importorskip("matplotlib")
    history, epochs = {"val_loss": [3.0, 2.0]}, {"val_loss": [2, 4]}
    (axis,) = plot(history, epochs, None, None).axes
    assert (axis.get_title(), axis.get_xlabel()) == ("loss", "epoch")
    (line,) = axis.lines
    assert line.get_label() == "validation"
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 4], [3.0, 2.0])


def test_one_name_may_be_given_as_text():
    pytest.importorskip("matplotlib")
    history = {"loss": [1.0], "accuracy": [0.5]}
    epochs = {"loss": [1], "accuracy": [1]}
    assert [axis.get_title() for axis in plot(history, epochs, "accuracy", None).axes] == [
        "accuracy"
    ]


def test_nothing_to_plot_is_an_error():
    pytest.importorskip("matplotlib")
    with pytest.raises(errors.StateError, match="nothing to plot") as caught:
        plot({}, {}, None, None)
    assert caught.value.expected == "a history: call train first"
    with pytest.raises(errors.StateError, match="no such metric") as caught:
        plot({"loss": [1.0]}, {"loss": [1]}, ["loss", "f1", "f2"], None)
    assert (caught.value.expected, caught.value.actual) == ("loss", "f1, f2")


def test_plots_are_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.DependencyError, match="extra that is not installed") as caught:
        plot({"loss": [1.0]}, {"loss": [1]}, None, None)
    assert caught.value.remedy == 'pip install "shardckpt[plot]"'
