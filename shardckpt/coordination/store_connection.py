"""Connections to a store of torch that can be abandoned.

If the network fails, a call to the store may never return.
"""

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

__all__ = ["StoreConnection", "StoreConnections"]

_Call = Callable[[], Any]

_FORGOTTEN_S = 60.0
"""Seconds after which an unused connection is closed: firewalls drop connections that are idle for
minutes."""


class StoreConnections:
    """The connections to one store, kept between operations.

    For each new connection torch resolves the names of both ends while all other requests wait,
    which takes seconds with a slow name server.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._kept: list[tuple[StoreConnection, float]] = []

    def take(self) -> StoreConnection:
        """Take a connection. Raises RankFailedError after the deadline."""
        with self._lock:
            connection, since = self._kept.pop() if self._kept else (None, 0.0)
        if connection is not None and time.monotonic() - since < _FORGOTTEN_S:
            connection.deadline_s = current().deadline_s
            return connection
        self.close()  # connections that were idle for even longer
        if connection is not None:
            connection.close()
        return StoreConnection(self._connect)

    @contextmanager
    def connection(self) -> Iterator[StoreConnection]:
        """Take a connection for the with block."""
        connection = self.take()
        try:
            yield connection
        finally:
            self.give_back(connection)

    def give_back(self, connection: StoreConnection) -> None:
        """Return a connection for later use."""
        if connection.failed:
            connection.close()
            return
        with self._lock:
            self._kept.append((connection, time.monotonic()))

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._lock:
            kept, self._kept = self._kept, []
        for connection, _ in kept:
            connection.close()


class StoreConnection:
    """A connection to a store. Its calls raise RankFailedError after the deadline.

    The connection has its own thread, which is abandoned together with a call that hangs.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.deadline_s = current().deadline_s  # read once: an operation makes many calls
        self.hangs = False  # a call has not returned
        # A call raised an error or was not waited for. Do not use the connection again.
        self.failed = False
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="shardckpt-connection").start()
        self._store = self.ask(connect)

    def below(self, prefix: str) -> Any:
        """Return the methods of the store for keys below a prefix."""
        return _Below(self, PrefixStore(prefix, self._store))

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._calls.put(None)

    def ask(self, call: _Call) -> Any:
        """Make a call. Returns or raises what the call does."""
        if not self.hangs:
            before, self.failed = self.failed, True  # a ctrl-c leaves an answer in the queue
            self._calls.put(call)
            try:
                well, value = self._answers.get(timeout=self.deadline_s)
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
            expected=f"an answer within {self.deadline_s:g} s",
            actual="no answer: its host or the network failed",
            remedy="read the logs of rank 0 and the launcher; nothing was committed",
        )

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._answers.put((True, call()))
            except BaseException as error:
                self._answers.put((False, error))


class _Below:
    def __init__(self, connection: StoreConnection, store: Any) -> None:
        self._connection = connection
        self._store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)
        return lambda *arguments: self._connection.ask(lambda: method(*arguments))
