"""Plots of the history."""

from __future__ import annotations

import os

import pytest

from shardckpt import NNHandler, errors
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
