"""Pools of threads with buffers, and threads that hang."""

from __future__ import annotations

import threading

import pytest

import shardckpt
from shardckpt.errors import StalledError
from shardckpt.io import buffers, threads
from shardckpt.io.threads import stalled, workers


def test_the_end_of_the_block_waits_for_the_threads():
    ended = []
    started, go_on = threading.Event(), threading.Event()

    def work():
        started.set()
        go_on.wait(60)
        ended.append(True)

    with workers(1, "test", buffers=2) as (pool, lent):
        assert len(lent) == 2
        pool.submit(work)
        assert started.wait(60)
        go_on.set()
    assert ended == [True]


def test_after_an_error_queued_work_is_dropped_and_running_work_is_awaited():
    ran = []
    started, go_on = threading.Event(), threading.Event()

    def first():
        started.set()
        go_on.wait(60)
        ran.append("first")

    with pytest.raises(ZeroDivisionError), workers(1, "test", buffers=0) as (pool, _):
        pool.submit(first)
        dropped = pool.submit(ran.append, "second")
        dropped.add_done_callback(lambda _: go_on.set())
        assert started.wait(60)
        raise ZeroDivisionError
    assert ran == ["first"]
    assert dropped.cancelled()


def test_a_thread_that_hangs_is_abandoned_with_its_buffers(monkeypatch):
    monkeypatch.setattr(threads, "_abandoned", [])
    hangs = threading.Event()
    with pytest.raises(StalledError), workers(1, "test", buffers=1) as (pool, lent):
        pool.submit(hangs.wait, 60)
        (buffer,) = lent
        raise stalled("A write")
    assert not hangs.is_set()
    assert all(free is not buffer for free in buffers._free)
    assert len(threads._abandoned) == 1
    hangs.set()


def test_the_error_of_a_hanging_read_names_the_path_and_the_deadline():
    with shardckpt.options(stall_deadline_s=2.5):
        error = stalled("Reading", "/data/c")
    assert error.message == "Reading makes no progress"
    assert error.path == "/data/c"
    assert error.expected == "an answer within 2.5 s"
    assert "stall_deadline_s" in error.remedy
