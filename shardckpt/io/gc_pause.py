"""Pause the cyclic garbage collector of Python during plans and small loads.

Building a plan creates tens of thousands of small objects, none of them garbage. Without the pause
the collector would repeatedly scan all of them, and all objects of the training job.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]

_lock = threading.Lock()
_pauses = 0
_resume = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector in all threads during the with block.

    Use it for milliseconds of work, not for long I/O or for waits.
    """
    global _pauses, _resume
    with _lock:
        if not _pauses:
            _resume = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if not _pauses and _resume:
                gc.enable()
