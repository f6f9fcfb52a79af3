"""A thread that copies checkpoints to slower tiers, and repeats what fails."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable

from shardckpt.errors import CheckpointError, StateError
from shardckpt.logs import logger

__all__ = ["Drain", "OthersCopyError"]

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_LONGEST_WAIT_FOR_OTHERS_S = 5.0


class OthersCopyError(Exception):
    """Raised by a task that has done its part, and waits for other processes."""


class Drain:
    """A thread that works through tasks, and repeats those that fail.

    It ends when nothing is left. At the end of the program it finishes what can be done, and gives
    up what fails.
    """

    def __init__(self) -> None:
        self._begin()
        _drains.add(self)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Hashable, Callable[[], None]]] = deque()
        self._running: Hashable = None
        self._thread: threading.Thread | None = None
        self._failed: set[Hashable] = set()  # since the last wait
        self._wanted: set[Hashable] = set()
        self._dropped: dict[Hashable, Exception] = {}
        self._ending = False

    def finish(self) -> None:
        """Wait until what can be done is done, and give up what fails."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None)

    def add(self, key: Hashable, task: Callable[[], None], *, wanted: bool = False) -> None:
        """Queue a task. A task with the same key that has not begun is replaced.

        Args:
            key: The key; for a task of a path a tuple that begins with it.
            task: The task.
            wanted: If the task can never succeed, `wait` and `wait_all` raise its error.
        """
        with self._changed:
            self._tasks = deque(one for one in self._tasks if one[0] != key)
            self._tasks.append((key, task))
            self._failed.discard(key)
            self._dropped.pop(key, None)
            if wanted:
                self._wanted.add(key)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="shardckpt-drain")
                self._thread.start()
            self._changed.notify_all()

    def forget(self, path: str) -> None:
        """Drop the tasks of a path that have not begun, and their errors."""

        def others(key: Hashable) -> bool:
            return not isinstance(key, tuple) or key[0] != path

        with self._changed:
            self._tasks = deque(one for one in self._tasks if others(one[0]))
            self._wanted = set(filter(others, self._wanted))
            self._dropped = {key: error for key, error in self._dropped.items() if others(key)}
            self._changed.notify_all()

    def waits(self, key: Hashable) -> bool:
        """Whether a task has not ended."""
        with self._changed:
            return self._waits(key)

    def _waits(self, key: Hashable) -> bool:
        return key is not None and (
            key == self._running or any(one[0] == key for one in self._tasks)
        )

    def wait(self, key: Hashable, timeout: float | None) -> None:
        """Wait until a task has ended. Raises its error if it can never succeed."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._waits(key), timeout):
                raise TimeoutError(f"{key} is not copied after {timeout} s")
            if key in self._dropped:
                raise self._dropped[key]

    def wait_all(self, timeout: float | None) -> None:
        """Wait until nothing is left. Raises the error of a task that can never succeed, if it is
        wanted."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, timeout):
                raise TimeoutError(f"{len(self._tasks)} tasks are left after {timeout} s")
            for error in self._dropped.values():
                raise error

    def _work(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            with self._changed:
                if not self._tasks:
                    self._thread = None
                    self._changed.notify_all()
                    return
                self._running, task = self._tasks.popleft()
                key = self._running
            longest_wait_s, error = _tried(key, task, wait_s)
            with self._changed:
                self._running = None
                if not longest_wait_s and not self._waits(key) and key in self._wanted:
                    self._wanted.discard(key)
                    if error is not None:
                        self._dropped[key] = error
                if longest_wait_s and not self._ending and not self._waits(key):
                    self._tasks.append((key, task))
                self._changed.notify_all()
                if not longest_wait_s:
                    wait_s = _FIRST_WAIT_S
                    continue
                self._failed.add(key)
                if self._has_untried():
                    continue
                self._changed.wait_for(lambda: self._ending or self._has_untried(), wait_s)
                self._failed.clear()
            wait_s = min(2 * wait_s, longest_wait_s)

    def _has_untried(self) -> bool:
        """Whether a task has not failed since the last wait."""
        return any(key not in self._failed for key, _ in self._tasks)


def _tried(
    key: Hashable, task: Callable[[], None], wait_s: float
) -> tuple[float, Exception | None]:
    """Carry out a task.

    Returns:
        The longest wait before the next attempt, or 0 without another attempt; and the error.
    """
    try:
        task()
    except OthersCopyError as error:
        return _LONGEST_WAIT_FOR_OTHERS_S, error
    except (CheckpointError, StateError) as error:
        logger.warning("%s is not copied: %s", key, error)
        return 0.0, error
    except Exception as error:
        # Whatever it is, training goes on.
        logger.warning("%s: tried again in %g s: %s", key, wait_s, error)
        return _LONGEST_WAIT_S, error
    return 0.0, None


_drains: weakref.WeakSet[Drain] = weakref.WeakSet()


def _at_exit() -> None:
    for drain in list(_drains):
        drain.finish()


def _in_forked_child() -> None:
    """Leave the tasks to the parent: a forked child, such as a worker of a DataLoader, has none of
    its threads, and would wait for them at its end."""
    for drain in list(_drains):
        drain._begin()


os.register_at_fork(after_in_child=_in_forked_child)

# Before the executors of this process refuse work, which is before atexit. Private; tried with
# Python 3.11.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
