"""Requests from outside to stop: SIGTERM and SIGINT, heard of between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequests", "leave", "stop_requests"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """`received`: the first signal, 0 before it. A second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """To be called with a signal."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


@contextmanager
def stop_requests(*, enabled: bool) -> Iterator[StopRequests]:
    """Inside the with block SIGTERM and SIGINT are noted; in threads other than the main one,
    where Python allows no handlers, nothing is heard."""
    requests = StopRequests()
    heard = enabled and threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, requests.note) for n in _SIGNALS} if heard else {}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            # None stands for one that was not set from Python, and can't be from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave(number: int) -> None:
    """End as a process does that got a signal: KeyboardInterrupt, or exit with 128 + number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
