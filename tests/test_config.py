"""Options: defaults, environment, with blocks, and the threads that they reach."""

from __future__ import annotations

import threading

import pytest
import torch

import shardckpt
from shardckpt.config import Options, current
from shardckpt.errors import OptionError, StateError
from shardckpt.saving import async_save


def test_the_environment_is_read_when_an_option_is_used(monkeypatch):
    assert current().read_threads == Options().read_threads
    monkeypatch.setenv("SHARDCKPT_READ_THREADS", "3")
    assert current().read_threads == 3


def test_a_with_block_wins_over_the_environment_and_ends(monkeypatch):
    monkeypatch.setenv("SHARDCKPT_DEADLINE_S", "7")
    with shardckpt.options(deadline_s=5, read_threads=2):
        with shardckpt.options(deadline_s=4):
            assert current().deadline_s == 4
        assert (current().deadline_s, current().read_threads) == (5, 2)
    assert current().deadline_s == 7


def test_another_thread_keeps_its_options():
    seen = []
    with shardckpt.options(deadline_s=5):
        thread = threading.Thread(target=lambda: seen.append(current().deadline_s))
        thread.start()
        thread.join()
    assert seen == [Options().deadline_s]


def test_an_async_save_keeps_the_options_of_its_call(tmp_path, monkeypatch):
    seen = []

    def look(plan):
        seen.append(current().stall_deadline_s)
        return staged_bytes(plan)

    staged_bytes = async_save.staged_bytes
    monkeypatch.setattr(async_save, "staged_bytes", look)
    with shardckpt.options(stall_deadline_s=50):
        handle = shardckpt.async_save({"a": torch.ones(4)}, tmp_path / "a")
    handle.result()
    assert seen == [50]


@pytest.mark.parametrize("value", ["many", -1, float("nan"), None])
def test_bad_values_are_refused(value, monkeypatch):
    with pytest.raises(OptionError, match="read_threads"), shardckpt.options(read_threads=value):
        pass
    monkeypatch.setenv("SHARDCKPT_READ_THREADS", str(value))
    with pytest.raises(StateError, match="SHARDCKPT_READ_THREADS"):
        current()


def test_an_unknown_option_is_refused():
    with pytest.raises(OptionError, match="read_thread'"), shardckpt.options(read_thread=1):
        pass
