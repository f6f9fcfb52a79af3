"""Connections to a store that can be left: where the network is gone, a call to torch's store never
returns."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from shardckpt.config import current
from shardckpt.errors import RankFailedError

__all__ = ["Line", "Lines"]

_Call = Callable[[], Any]

_FORGOTTEN_S = 60.0
"""Firewalls forget connections that were silent for some minutes."""


class Lines:
    """The connections to one store, kept from operation to operation.

    For each new one torch asks the name server for the names of both ends, with all other
    requests waiting: where the name server is slow that takes seconds.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._kept: list[tuple[Line, float]] = []

    def take(self) -> Line:
        """A connection for the caller alone. Raises RankFailedError past the deadline."""
        with self._lock:
            line, since = self._kept.pop() if self._kept else (None, 0.0)
        if line is not None and time.monotonic() - since < _FORGOTTEN_S:
            return line
        self.close()  # what has been kept for even longer
        if line is not None:
            line.close()
        return Line(self._connect)

    @contextmanager
    def line(self) -> Iterator[Line]:
        """One for the length of a with block."""
        line = self.take()
        try:
            yield line
        finally:
            self.give_back(line)

    def give_back(self, line: Line) -> None:
        """Keep it for whoever takes one next."""
        if line.failed:
            line.close()
            return
        with self._lock:
            self._kept.append((line, time.monotonic()))

    def close(self) -> None:
        """Close those that nobody has taken."""
        with self._lock:
            kept, self._kept = self._kept, []
        for line, _ in kept:
            line.close()


class Line:
    """A connection to a store; a call through it raises RankFailedError past the deadline.

    Calls are made by a thread of the line's own, which is left behind with a call that hangs.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.hangs = False  # a call has not returned
        self.failed = False  # or has raised, or nobody has waited for it: not to be used again
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="shardckpt-line").start()
        self._store = self.ask(connect)

    def below(self, prefix: str) -> Any:
        """The store's methods, for keys below a prefix."""
        return _Below(self, PrefixStore(prefix, self._store))

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._calls.put(None)

    def ask(self, call: _Call) -> Any:
        """What a call returns or raises."""
        if not self.hangs:
            before, self.failed = (
                self.failed,
                True,
            )  # a ctrl-c leaves the answer to whoever asks next
            self._calls.put(call)
            try:
                well, value = self._answers.get(timeout=current().deadline_s)
            except queue.Empty:
                self.hangs = True
            else:
                if well:
                    self.failed = before
                    return value
                raise value
        raise RankFailedError(
            "The store of the process group does not answer",
            rank=0,
            expected=f"an answer within {current().deadline_s:g} s",
            actual="none: its host, or the network to it, is gone",
            remedy="look at the log of rank 0 and of the launcher; nothing was committed",
        )

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._answers.put((True, call()))
            except BaseException as error:
                self._answers.put((False, error))


class _Below:
    def __init__(self, line: Line, store: Any) -> None:
        self._line = line
        self._store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)
        return lambda *arguments: self._line.ask(lambda: method(*arguments))
