"""Saves in the background: one thread stages the states and another one writes, in call order.

The state must not change between the call and the end of staging. Steps of optimizers change it, so
the step of every torch optimizer waits: the CPU until the tensors on the CPU are staged, and the
current stream of each device until the tensors of that device are staged.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardckpt.config import current
from shardckpt.coordination.resolve import Operation
from shardckpt.errors import StateError
from shardckpt.io.devices import Mark, submitted_work, wait_for, wait_on_device
from shardckpt.io.gc_pause import collector_paused
from shardckpt.logs import logger
from shardckpt.plan.local_plan import LocalPlan, local_plan
from shardckpt.reports import SaveReport
from shardckpt.saving.replicas import replica_digests
from shardckpt.saving.staged_part import Divider, StagedPart, part_of
from shardckpt.saving.staging import StagingBuffer, StagingPool, stage, staged_bytes
from shardckpt.state.flatten import FlatState, flatten
from shardckpt.state.snapshot import Snapshot, take_snapshot

__all__ = ["SaveHandle", "start_save", "wait_until_staged"]

_HEAD_START_S = 0.001
"""Staging waits until async_save has returned, as a new thread can hold the GIL for 5 ms."""


class Save(Protocol):
    """Saves a plan. `plan` returns the staged plan, or raises the error of the staging. `part`
    then returns the part that was staged, or None if all data were."""

    def __call__(
        self, plan: Callable[[], LocalPlan], *, part: Callable[[], StagedPart | None]
    ) -> SaveReport: ...


WaitForTier = Callable[[str, int, float | None], None]


class SaveHandle:
    """A save in the background, returned by `async_save`.

    Args:
        path: The checkpoint.
        staging: A future that is done when the state is staged.
        saving: A future of the report of the save.
        wait_for_tier: Waits until a tier holds the checkpoint; see Storage.wait_for_tier.

    Example:
        >>> import shardckpt, torch
        >>> state = {"weight": torch.ones(3)}
        >>> handle = shardckpt.async_save(state, "run/step-1")
        >>> handle.wait_staged()
        >>> state["weight"] += 1  # the state may change now
        >>> handle.result().world_size
        1
    """

    def __init__(
        self,
        path: str,
        staging: Future[None],
        saving: Future[SaveReport],
        wait_for_tier: WaitForTier = lambda path, tier, timeout: None,
    ) -> None:
        self.path = path
        self._wait_for_tier = wait_for_tier
        self._staging = staging
        self._saving = saving
        self._error_raised = False

    def wait_staged(self, timeout: float | None = None) -> None:
        """Wait until the state is staged, and may change. Not collective.

        An error of the staging is raised by `result`.

        Args:
            timeout: Seconds to wait; None waits without a limit.

        Raises:
            TimeoutError: The state is not staged in time. The save continues.
        """
        if not wait([self._staging], timeout).done:
            raise TimeoutError(f"the state for {self.path} is not staged after {timeout} s")

    def result(self, timeout: float | None = None, *, tier: int = 0) -> SaveReport:
        """Wait for the save. Not collective.

        Args:
            timeout: Seconds to wait; None waits without a limit.
            tier: The tier of a TieredStorage that must hold the checkpoint, on the rank that copies
                it: rank 0. 0 is the first one.

        Returns:
            The report of the save.

        Raises:
            TimeoutError: The save has not ended in time. It continues.
            ShardckptError: The error with which the save failed; see `save`.
        """
        if not wait([self._saving], timeout).done:
            raise TimeoutError(f"the save to {self.path} is not done after {timeout} s")
        self._error_raised = True
        report = self._saving.result()
        if tier:
            self._wait_for_tier(self.path, tier, timeout)
        return report

    def done(self) -> bool:
        """Return whether the save has ended, without waiting for it.

        Returns:
            True if it has succeeded or failed, False while it runs. Not collective.
        """
        return self._saving.done()

    def _take_unraised_error(self) -> BaseException | None:
        if self._error_raised or not self.done():
            return None
        self._error_raised = True
        return self._saving.exception()


def start_save(
    state: Any,
    path: str,
    *,
    ranks: Operation,
    dividing: Operation | None,
    check_replicas: bool,
    save: Save,
    wait_for_tier: WaitForTier = lambda path, tier, timeout: None,
) -> SaveHandle:
    """Take a snapshot of the state, and stage and save it in the background.

    If an earlier save has failed and `result` of its handle was not called, its error is raised
    here. The new save still starts, so that ranks that learn of the error at different times make
    the same saves.

    Args:
        state: The state.
        path: The path of the checkpoint.
        ranks: The ranks.
        dividing: The operation in which they divide the work before the staging; see Divider.
        check_replicas: See `save` of the package.
        save: Saves the staged plan.
        wait_for_tier: See SaveHandle.

    Returns:
        The handle of the save.
    """
    job = _Job(state, ranks, dividing, save, check_replicas=check_replicas)
    background = _the_background()
    errors = background.unraised_errors()
    handle = background.submit(path, job, wait_for_tier)
    for error in errors:
        raise error
    return handle


def wait_until_staged() -> None:
    """Wait until all saves that have begun are staged, so that their states may change."""
    for job in _background.staging_jobs if _background is not None else ():
        job.staged.wait()


class _Job:
    """One save: its snapshot, then its staged plan."""

    def __init__(
        self,
        state: Any,
        ranks: Operation,
        dividing: Operation | None,
        save: Save,
        *,
        check_replicas: bool,
    ) -> None:
        start = time.perf_counter()
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        self.dividing = dividing
        self.check_replicas = check_replicas
        self.save_plan = save
        self.error: Exception | None = None
        self.snapshot = Snapshot()
        try:
            with collector_paused():
                self.snapshot = take_snapshot(
                    state, small_bytes=current().copy_at_once_bytes, rank=self.rank
                )
        except Exception as error:  # raised on all ranks by the save
            self.error = error
        self.submitted = submitted_work()
        self.plan: LocalPlan | None = None
        self.part: StagedPart | None = None
        # Done when the copies from the CPU have ended, and those from devices were submitted.
        self.copies: Future[dict[torch.device, Mark]] = Future()
        # An event is read without a lock, which a KeyboardInterrupt might leave locked.
        self.staged = threading.Event()
        self.unchecked: tuple[Snapshot, FlatState] | None = None
        self.lock = threading.Lock()
        self.buffer: StagingBuffer | None = None
        self.seconds = {"snapshot": time.perf_counter() - start}

    def stage(self, pool: StagingPool, divider: Divider) -> None:
        """Copy the state. An error is kept for the save."""
        time.sleep(_HEAD_START_S)
        start = time.perf_counter()
        try:
            if self.error is None:
                self._stage(pool, divider)
        except Exception as error:
            self.error = error
        finally:
            if not self.copies.done():
                self.copies.set_result({})
            self.snapshot = Snapshot()  # drops the references to the state
            self.seconds["stage"] = time.perf_counter() - start
            self.staged.set()

    def _stage(self, pool: StagingPool, divider: Divider) -> None:
        flat = flatten(self.snapshot.state, rank=self.rank)
        plan = local_plan(flat, world_size=self.world_size)
        division = divider.divide(self.dividing, plan)
        own = plan if division is None else part_of(plan, division.writes)
        on_device = any(not data.is_cpu for data in own.data)
        self.buffer = pool.take(staged_bytes(own), locked=on_device)
        self.plan, marks = stage(own, self.buffer, self.submitted)
        try:
            if division is not None:
                for mark in self.submitted.values():
                    wait_for(mark)
                replicas = replica_digests(
                    plan,
                    division.writes,
                    everything=self.check_replicas,
                    sampled=division.merged,
                )
                self.part = StagedPart(
                    writes=division.writes, data=self.plan.data, replicas=replicas
                )
                self.plan = dataclasses.replace(plan, data=())
            self.unchecked = self.snapshot, flat
            self.copies.set_result(marks)
        finally:  # the memory is used until then
            for mark in marks.values():
                wait_for(mark)
        self._check()

    def before_step(self) -> None:
        """Make the step of an optimizer wait until the state is staged.

        The CPU waits for the copies from the CPU. Devices wait for those from devices.
        """
        marks = self.copies.result()
        self._check()
        for device, mark in marks.items():
            wait_on_device(device, mark)

    def _check(self) -> None:
        """Note an error if a tensor was changed before it was staged, and not by a step."""
        with self.lock:
            unchecked, self.unchecked = self.unchecked, None
            changed = unchecked and unchecked[0].changed(unchecked[1])
            if changed is not None:
                self.error = StateError(
                    "A tensor was changed before it was staged",
                    tensor=changed,
                    expected="no change between async_save and the end of its staging",
                    actual="a change in place, not by the step of a torch optimizer",
                    remedy="call handle.wait_staged() before changing it",
                )

    def save(self, staging: Future[None], pool: StagingPool) -> SaveReport:
        """Wait for the staging, then write and commit the checkpoint."""

        def staged_plan() -> LocalPlan:
            staging.result()
            if self.error is not None:
                raise self.error
            assert self.plan is not None
            return self.plan

        wait([staging])
        try:
            report = self.save_plan(staged_plan, part=lambda: self.part)
            return dataclasses.replace(report, seconds={**self.seconds, **report.seconds})
        finally:
            self.plan = self.part = None
            if self.buffer is not None:
                pool.give_back(self.buffer)
                self.buffer = None


class _Background:
    """The threads, the running saves, and the failed saves whose error was not raised yet."""

    def __init__(self) -> None:
        self.stager = ThreadPoolExecutor(1, "shardckpt-stage")
        self.saver = ThreadPoolExecutor(1, "shardckpt-save", initializer=_lower_priority)
        self.pool = StagingPool()
        self.divider = Divider()
        self.staging_jobs: tuple[_Job, ...] = ()
        self.handles: list[SaveHandle] = []
        self.lock = threading.Lock()

    def submit(self, path: str, job: _Job, wait_for_tier: WaitForTier) -> SaveHandle:
        """Queue a save."""
        with self.lock:
            # Each job runs in a copy of the caller's context, which holds the options of the call.
            staging = self.stager.submit(copy_context().run, job.stage, self.pool, self.divider)
            saving = self.saver.submit(copy_context().run, job.save, staging, self.pool)
            handle = SaveHandle(path, staging, saving, wait_for_tier)
            self.handles.append(handle)
            staging_jobs = [other for other in self.staging_jobs if not other.staged.is_set()]
            self.staging_jobs = (*staging_jobs, job)
        return handle

    def unraised_errors(self) -> list[BaseException]:
        """Return the errors of ended saves that were not raised yet, each only once."""
        with self.lock:
            ended = [handle for handle in self.handles if handle.done()]
            self.handles = [handle for handle in self.handles if handle not in ended]
        return [error for handle in ended if (error := handle._take_unraised_error())]

    def finish(self) -> list[BaseException]:
        """Wait for all saves. Returns the errors that were not raised yet."""
        wait([handle._saving for handle in self.handles])
        return self.unraised_errors()


_background: _Background | None = None
_lock = threading.Lock()


def _the_background() -> _Background:
    global _background
    with _lock:
        if _background is None:
            _background = _Background()
            register_optimizer_step_pre_hook(_before_step)
            # Executors refuse work before atexit functions run, so register an earlier callback.
            # The function is private; tried with Python 3.11.
            getattr(threading, "_register_atexit", atexit.register)(_at_exit)
        return _background


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Wait before the step of any optimizer.

    The hook is never removed, as that is not safe while another thread steps. It costs nothing
    while no state is being staged.
    """
    for job in _background.staging_jobs if _background is not None else ():
        if not job.staged.is_set():
            job.before_step()


def _at_exit() -> None:
    """Wait for the running saves without a limit, and log their errors."""
    for error in _background.finish() if _background is not None else ():
        logger.error("a save in the background failed", exc_info=error)


def _forget() -> None:
    """Reset the module in a forked child, which does not inherit the threads."""
    global _background, _lock
    _background, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _lower_priority() -> None:
    """Lower the priority of this thread and of those that it starts."""
    if sys.platform == "linux":  # other systems have no priority by thread
        thread = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, thread) + current().background_nice
        os.setpriority(os.PRIO_PROCESS, thread, nice)
