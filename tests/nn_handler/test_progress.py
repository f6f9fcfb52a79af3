"""The progress bar in a terminal, in a notebook and in a file."""

from __future__ import annotations

import io
import sys
import types

import shardckpt
from shardckpt.nn_handler import progress
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
