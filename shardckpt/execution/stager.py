"""Saves in the background: one thread, which runs them in the order of the calls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from shardckpt.reports import SaveReport

__all__ = ["SaveHandle", "start"]

_saver = ThreadPoolExecutor(1, "shardckpt-save")  # the interpreter's exit waits for it


class SaveHandle:
    """A save under way."""

    def __init__(self, future: Future[SaveReport]) -> None:
        self._future = future

    def staged(self, timeout_s: float | None = None) -> None:
        """Return once the state may change again: at once, as async_save has copied it."""

    def result(self, timeout_s: float | None = None) -> SaveReport:
        """Wait for the save and return its report, or raise what it raised.

        TimeoutError past `timeout_s` seconds; the save goes on.
        """
        return self._future.result(timeout_s)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()


def start(run: Callable[[], SaveReport]) -> SaveHandle:
    """Queue a save."""
    return SaveHandle(_saver.submit(run))
