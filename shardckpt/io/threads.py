"""Threads for reads and writes, with their buffers. A thread that hangs is abandoned."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from shardckpt.config import current
from shardckpt.errors import StalledError
from shardckpt.io.buffers import Buffer, lease

__all__ = ["stalled", "workers"]

_abandoned: list[object] = []


@contextmanager
def workers(
    threads: int, name: str, *, buffers: int, locked: bool = False
) -> Iterator[tuple[ThreadPoolExecutor, list[Buffer]]]:
    """Provide a pool of threads, and buffers, for the with block. See lease for `locked`.

    The end of the block waits for the threads. If the block ends in StalledError, it does not wait,
    as a thread that hangs in the kernel can't be stopped. The thread then keeps its buffers and all
    other memory that it may still write to, through the traceback of the error.
    """
    pool = ThreadPoolExecutor(threads, name)
    with ExitStack() as stack:
        leased = stack.enter_context(lease(buffers, locked=locked))
        try:
            yield pool, leased
        except StalledError as error:
            _abandoned.append((error, stack.pop_all()))
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown()


def stalled(what: str, path: str | None = None) -> StalledError:
    """Return the error for a read or write that exceeds its deadline. `what` is its subject."""
    return StalledError(
        f"{what} makes no progress",
        path=path,
        expected=f"an answer within {current().stall_deadline_s:g} s",
        actual="no answer",
        remedy="check the disk or the file server; the option stall_deadline_s sets the deadline",
    )
