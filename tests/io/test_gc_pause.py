"""The pause of the garbage collector."""

from __future__ import annotations

import gc
import os
import signal
import threading
import timeit

import pytest
import torch

import shardckpt
from shardckpt.io.gc_pause import collector_paused, ends_pauses


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in generators
def test_interrupts_at_any_moment_of_a_load_leave_the_collector_on(tmp_path):
    state = {"w": torch.ones(3)}
    shardckpt.save(state, tmp_path / "c")
    seconds = min(timeit.repeat(lambda: shardckpt.load(state, tmp_path / "c"), number=1))
    interrupts = 0
    for moment in range(300):
        interrupts += interrupted(seconds * (moment + 1) / 300, state, tmp_path / "c")
        assert gc.isenabled(), moment
    assert interrupts > 100
    # no interrupt left a lock that only this thread can take
    other = threading.Thread(target=shardckpt.load, args=(state, tmp_path / "c"), daemon=True)
    other.start()
    other.join(60)
    assert not other.is_alive()


def interrupted(after, state, path):
    """Interrupt a load after so many seconds, as Ctrl-C does. Returns whether it was in time.

    A real signal comes between two instructions where Python allows it. An exception of a trace
    function comes in other places too: at the end of a with block, it leaves the lock locked.
    """

    def interrupt(number, frame):
        if loading:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        loading = True
        signal.setitimer(signal.ITIMER_REAL, after)
        shardckpt.load(state, path)
        loading = False
    except KeyboardInterrupt:
        return True
    finally:
        loading = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


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
