"""SIGTERM and SIGINT are noted, and end training between two steps."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from shardckpt.nn_handler import signals
from shardckpt.nn_handler.signals import StopRequests, end_process, stop_requests


@pytest.fixture(autouse=True)
def usual_handlers():
    """SIGINT raises KeyboardInterrupt, also in a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted(number):
    with stop_requests(enabled=True) as requests:
        assert requests.received == 0
        os.kill(os.getpid(), number)
        assert requests.received == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.received == number


def test_a_second_ctrl_c_interrupts_at_once():
    with stop_requests(enabled=True) as requests, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert requests.received == signal.SIGTERM


def test_the_former_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="planted"), stop_requests(enabled=True) as requests:
        assert signal.getsignal(signal.SIGTERM) == requests.note
        raise ValueError("planted")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_handler_that_is_not_of_python_becomes_the_default(monkeypatch):
    """Python returns None for such a handler, and can not set it again."""
    calls = []
    monkeypatch.setattr(signals.signal, "signal", lambda *arguments: calls.append(arguments))
    with stop_requests(enabled=True):
        calls.clear()
    assert calls == [(signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.SIG_DFL)]


def test_signals_are_left_alone_unless_enabled():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_requests(enabled=False) as requests:
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert isinstance(requests, StopRequests)


def test_another_thread_than_the_main_one_sets_no_handlers():
    found = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with stop_requests(enabled=True) as requests:
            found.append((signal.getsignal(signal.SIGTERM) is before, requests.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(True, 0)]


def test_the_process_ends_as_the_signal_says():
    with pytest.raises(KeyboardInterrupt):
        end_process(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        end_process(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
