"""Python's cyclic garbage collector, held back while plans are made.

A plan makes tens of thousands of small objects, none of them garbage. Each few hundred would have
the collector walk over all of them, and over the objects of a whole training job.
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
    """No collection starts in the with block, in any thread; for milliseconds, not for I/O."""
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
