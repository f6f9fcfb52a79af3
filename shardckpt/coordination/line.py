"""A store that can be left: where the network is gone, a call to torch's store never returns."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from shardckpt import knobs
from shardckpt.errors import RankFailedError

__all__ = ["Line"]

_Call = Callable[[], Any]


class Line:
    """A connection to a store, with its methods; each raises RankFailedError past the deadline.

    Calls are made by a thread of the line's own, which is left behind with a call that hangs.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.broken = False
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="shardckpt-line").start()
        self._store = self._ask(connect)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)
        return lambda *arguments: self._ask(lambda: method(*arguments))

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._calls.put(None)

    def _ask(self, call: _Call) -> Any:
        if not self.broken:
            self._calls.put(call)
            try:
                well, value = self._answers.get(timeout=knobs.DEADLINE_S)
            except queue.Empty:
                self.broken = True
            else:
                if well:
                    return value
                raise value
        raise RankFailedError(
            "The store of the process group does not answer",
            rank=0,
            expected=f"an answer within {knobs.DEADLINE_S:g} s",
            actual="none: its host, or the network to it, is gone",
            remedy="look at the log of rank 0 and of the launcher; nothing was committed",
        )

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._answers.put((True, call()))
            except BaseException as error:
                self._answers.put((False, error))
