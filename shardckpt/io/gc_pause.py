"""Pause the cyclic garbage collector of Python during plans and small loads.

Building a plan creates tens of thousands of small objects, none of them garbage. Without the pause
the collector would repeatedly scan all of them, and all objects of the training job.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["collector_paused", "ends_pauses"]

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.RLock()
_pauses: dict[int, int] = {}  # the pauses of each thread that has any
_resume = False  # the collector was enabled before the pauses


class collector_paused:
    """Pause the collector in all threads during the with block.

    Use it for milliseconds of work, not for long I/O or for waits. A KeyboardInterrupt may prevent
    the end of the pause: see ends_pauses.
    """

    def __enter__(self) -> None:
        global _resume
        with _lock:
            if not _pauses:
                _resume = gc.isenabled()
            _set(_pauses.get(threading.get_ident(), 0) + 1)

    def __exit__(self, *error: object) -> None:
        with _lock:
            _set(_pauses.get(threading.get_ident(), 0) - 1)


def ends_pauses(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that it ends all pauses that it has begun, also if a KeyboardInterrupt
    hits their own end.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        before = _pauses.get(threading.get_ident(), 0)
        try:
            return function(*args, **kwargs)
        finally:
            with _lock:
                _set(before)

    return call


def _set(count: int) -> None:
    """Set the number of pauses of this thread. The caller holds the lock."""
    global _resume
    if count > 0:
        _pauses[threading.get_ident()] = count
        gc.disable()
    else:
        _pauses.pop(threading.get_ident(), None)
    if not _pauses and _resume:
        gc.enable()
        _resume = False


def _in_child() -> None:
    """Forget the pauses of other threads, which a forked child does not have."""
    global _lock
    _lock = threading.RLock()
    own = _pauses.get(threading.get_ident(), 0)
    _pauses.clear()
    _set(own)


os.register_at_fork(after_in_child=_in_child)
