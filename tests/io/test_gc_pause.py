"""The pause of the garbage collector."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import timeit

import pytest
import torch

import shardckpt
from shardckpt.io.gc_pause import collector_paused, ends_pauses
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def enabled():
    gc.enable()
    yield
    gc.enable()


def test_the_collector_runs_again_after_the_outer_block_and_after_an_error():
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collector_paused():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_a_collector_that_the_program_disabled_stays_disabled():
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()


def test_a_thread_that_leaves_first_does_not_end_the_pause_of_another():
    entered, leave = threading.Event(), threading.Event()

    def pause():
        with collector_paused():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=pause)
    with collector_paused():
        thread.start()
        assert entered.wait(60)
    assert not gc.isenabled()
    leave.set()
    thread.join(60)
    assert gc.isenabled()


def test_a_function_ends_a_pause_whose_end_was_interrupted(monkeypatch):
    def interrupted(pause, *error):
        raise KeyboardInterrupt

    @ends_pauses
    def work():
        with collector_paused():
            pass

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collector_paused, "__exit__", interrupted)
        work()
    assert gc.isenabled()
    with collector_paused():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(collector_paused, "__exit__", interrupted)
            work()
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.ranks
def test_interrupts_at_any_moment_of_a_load_leave_the_collector_on(tmp_path):
    # In a process of its own: an interrupt may leave a lock of logging or of a future locked.
    (interrupts,) = run_ranks(1, interrupt_loads, str(tmp_path / "c"))
    assert interrupts > 100


def interrupt_loads(path):
    """Interrupt loads at 300 moments, as Ctrl-C does. Returns how many were in time."""

    def interrupt(number, frame):
        if loading:
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    sys.unraisablehook = lambda hook: None  # of interrupts in generators that are closed
    loading = False
    state = {"w": torch.ones(3)}
    shardckpt.save(state, path)
    seconds = min(timeit.repeat(lambda: shardckpt.load(state, path), number=1))
    interrupts = 0
    for moment in range(300):
        try:
            loading = True
            signal.setitimer(signal.ITIMER_REAL, seconds * (moment + 1) / 300)
            shardckpt.load(state, path)
            loading = False
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            loading = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert gc.isenabled(), moment
    return interrupts


def test_a_forked_child_has_no_pause_of_another_thread():
    entered, leave = threading.Event(), threading.Event()

    def pause():
        with collector_paused():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=pause)
    thread.start()
    assert entered.wait(60)
    child = os.fork()
    if not child:
        os._exit(0 if gc.isenabled() else 1)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join(60)
    assert gc.isenabled()
