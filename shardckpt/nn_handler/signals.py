"""SIGTERM and SIGINT, which end training between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequests", "end_process", "stop_requests"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """`received` is the first signal, or 0. A second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


@contextmanager
def stop_requests(*, enabled: bool) -> Iterator[StopRequests]:
    """Note SIGTERM and SIGINT inside the with block.

    Only in the main thread: Python allows no signal handlers in others.
    """
    requests = StopRequests()
    heard = enabled and threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, requests.note) for n in _SIGNALS} if heard else {}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            # None means a handler of C, which can't be set again from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def end_process(number: int) -> None:
    """End the process as a signal does: KeyboardInterrupt, or exit with 128 + number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
