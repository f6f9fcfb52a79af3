"""Threads that read or write, with their buffers; one that hangs is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from shardckpt.config import current
from shardckpt.errors import StalledError
from shardckpt.io.buffers import Buffer, lease

__all__ = ["stalled", "workers"]

_left_behind: list[object] = []


@contextmanager
def workers(
    threads: int, name: str, *, buffers: int
) -> Iterator[tuple[ThreadPoolExecutor, list[Buffer]]]:
    """A pool and buffers for the length of a with block; the end of it waits for the threads.

    Unless it ends in StalledError: a thread that hangs in the kernel can't be ended. It keeps its
    buffers, and whatever else it may still write to: all that the error's traceback holds.
    """
    pool = ThreadPoolExecutor(threads, name)
    with ExitStack() as stack:
        leased = stack.enter_context(lease(buffers))
        try:
            yield pool, leased
        except StalledError as error:
            _left_behind.append((error, stack.pop_all()))
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown()


def stalled(what: str, path: str | None = None) -> StalledError:
    """The error for a read or write that has taken too long."""
    return StalledError(
        f"{what} makes no progress",
        path=path,
        expected=f"an answer within {current().stall_deadline_s:g} s",
        actual="none",
        remedy="look at the disk or the file server; SHARDCKPT_STALL_DEADLINE_S sets the time",
    )
