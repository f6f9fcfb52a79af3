"""The pause of the garbage collector."""

from __future__ import annotations

import gc
import threading

import pytest

from shardckpt.io.gc_pause import collector_paused


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
