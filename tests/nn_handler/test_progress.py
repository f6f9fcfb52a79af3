"""The progress bar in a terminal, in a notebook and in a file."""

from __future__ import annotations

import io
import sys
import types
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import shardckpt
from shardckpt.nn_handler import ProgressBar, progress
from tests.nn_handler.models import a_handler


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_bar_in_a_terminal_and_in_a_file(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr(sys, "stderr", stream)
        a_handler().train(2, gradient_accumulation_steps=2)
    assert "/3 [" in terminal.getvalue()  # 6 batches
    assert "validation batch" in terminal.getvalue()
    lines = file.getvalue().splitlines()
    assert [line.split()[:3] for line in lines] == [["epoch", "1", "loss"], ["epoch", "2", "loss"]]
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # not installed
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert progress._tqdm() is None


def test_the_bar_of_a_notebook_needs_no_terminal(monkeypatch):
    kernel = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert progress._tqdm() is not None
    assert shardckpt.__version__


class Bar:
    """A bar of tqdm that notes its calls."""

    made: ClassVar[list] = []

    def __init__(self, **options) -> None:
        self.options, self.steps, self.texts, self.closed = options, 0, [], False
        Bar.made.append(self)

    def update(self, count):
        self.steps += count

    def set_description_str(self, text):
        self.texts.append(text)

    def set_postfix_str(self, text, refresh):
        self.texts.append(text)

    def close(self):
        self.closed = True


class Endless:
    def __len__(self):
        raise TypeError


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(progress, "_tqdm", lambda: Bar)
    return Bar.made


def at(loader=(), rank: int = 0, epoch: int = 0) -> SimpleNamespace:
    data = SimpleNamespace(loader=loader)
    return SimpleNamespace(rank=rank, epoch=epoch, step=7, train_data=data)


@pytest.mark.parametrize(
    ("arguments", "loader", "total"),
    [
        ((), range(7), 7),
        ((2,), range(7), 4),
        ((2, 5), range(7), 3),
        ((2, 99), range(7), 4),
        ((2, 5), Endless(), None),
    ],
)
def test_a_bar_counts_the_steps_of_an_epoch(bars, arguments, loader, total):
    bar, handler = ProgressBar(*arguments), at(loader, epoch=2)
    bar.on_train_start(handler)
    bar.on_step_end(handler, torch.ones(()))
    (one,) = bars
    assert (one.options["total"], one.options["desc"], one.steps) == (total, "epoch 3", 1)


def test_an_epoch_leaves_a_line_and_the_next_one_has_its_own_bar(bars, capsys):
    bar, handler = ProgressBar(), at(range(2))
    bar.on_train_start(handler)
    for epoch in (1, 2):
        bar.on_step_end(handler, torch.ones(()))
        bar.on_validation_batch_start(handler, None, 4)
        bar.on_validation_end(handler, {})
        handler.epoch = epoch
        bar.on_epoch_end(handler, {"loss": 0.5})
    assert [one.closed for one in bars] == [True, True]
    assert bars[0].texts == ["epoch 1, validation batch 5", "epoch 1"]
    lines = capsys.readouterr().err.splitlines()
    texts = [line.rpartition("  ")[0] for line in lines]
    assert texts == ["epoch 1  loss 0.5", "epoch 2  loss 0.5"]


def test_the_loss_is_read_a_few_times_a_second(bars, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now_s, now_s=0.0)
    monkeypatch.setattr(progress, "time", clock)
    bar, handler = ProgressBar(), at(range(9))
    bar.on_train_start(handler)
    for clock.now_s in (0.1, 0.25, 0.3, 0.5):
        bar.on_step_end(handler, torch.tensor(clock.now_s))
    assert bars[0].texts == ["loss 0.25", "loss 0.5"]


def test_other_ranks_show_nothing(bars, capsys):
    bar, handler = ProgressBar(), at(range(2), rank=1)
    bar.on_train_start(handler)
    bar.on_step_end(handler, torch.ones(()))
    bar.on_epoch_end(handler, {"loss": 0.5})
    bar.on_exception(handler, KeyboardInterrupt())
    assert bars == []
    assert capsys.readouterr().err == ""


def test_a_signal_closes_the_bar_and_names_the_step(bars, capsys):
    bar, handler = ProgressBar(), at(range(2))
    bar.on_train_start(handler)
    bar.on_step_end(handler, torch.ones(()))
    bar.on_exception(handler, ValueError())
    assert bars[0].closed
    assert capsys.readouterr().err == ""
    bar.on_exception(handler, SystemExit())
    assert capsys.readouterr().err == "training stops at step 7\n"
