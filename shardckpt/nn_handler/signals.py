"""Requests from outside to stop: SIGTERM and SIGINT, heard of between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequests", "leave"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """Inside a with block the first SIGTERM or SIGINT is noted in `received`; a second SIGINT
    raises KeyboardInterrupt at once. In threads other than the main one nothing is heard."""

    def __init__(self, *, enabled: bool) -> None:
        self.received = 0
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if self._enabled:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


def leave(number: int) -> None:
    """End as a process does that got a signal: KeyboardInterrupt, or exit with 128 + number."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
