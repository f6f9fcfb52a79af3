"""Every constant that a user may want to change, with the environment variable that does."""

from __future__ import annotations

import os

__all__ = [
    "ARRIVAL_DEADLINE_S",
    "BACKGROUND_NICE",
    "COPY_AT_ONCE_BYTES",
    "DEADLINE_S",
    "READ_PAST_CACHE",
    "READ_THREADS",
    "SHARED_DEADLINE_S",
    "STAGING_BYTES",
    "STALL_DEADLINE_S",
]


def _number(name: str, default: float, *, least: float) -> float:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value < float("inf"):
        raise ValueError(f"{name}: a number of at least {least} is expected, found {text!r}")
    return value


ARRIVAL_DEADLINE_S = _number("SHARDCKPT_ARRIVAL_DEADLINE_S", 600.0, least=0.1)
"""How long ranks wait for one that has not called save or load yet, or, in a group that NNHandler
started, in a collective of training."""

DEADLINE_S = _number("SHARDCKPT_DEADLINE_S", 30.0, least=0.1)
"""How long a rank that takes part may give no sign of life."""

STALL_DEADLINE_S = _number("SHARDCKPT_STALL_DEADLINE_S", 600.0, least=0.1)
"""How long a rank that is alive may take for one read or write, or one copy of it."""

SHARED_DEADLINE_S = _number("SHARDCKPT_SHARED_DEADLINE_S", 0.8, least=0.1)
"""How long a rank waits to see the directory that rank 0 made: network file systems may be late."""

READ_THREADS = int(_number("SHARDCKPT_READ_THREADS", min(8, os.cpu_count() or 1), least=1))
"""Reads in flight, each from a thread of its own; twice as many past the page cache."""

READ_PAST_CACHE = bool(_number("SHARDCKPT_READ_PAST_CACHE", 1, least=0))
"""Whether what is not in the page cache may be read past it, where no other rank of the machine
reads the same. 0 where processes that know nothing of each other do."""

STAGING_BYTES = int(_number("SHARDCKPT_STAGING_BYTES", 0, least=0))
"""How much staged state a process may hold; a save beyond it is staged once earlier ones are
written. One save is always let in. 0: room for two."""

COPY_AT_ONCE_BYTES = int(_number("SHARDCKPT_COPY_AT_ONCE_BYTES", 64 << 10, least=0))
"""async_save copies tensors of up to this size that stand in the state by themselves, neither
parameter nor optimizer state, before it returns."""

BACKGROUND_NICE = int(_number("SHARDCKPT_BACKGROUND_NICE", 10, least=0))
"""By how much the threads that write in the background give way to others (see nice(1))."""
