"""Histories of a CheckpointManager that removes what it need not keep, and the oracle for what a
crash leaves: all that is to be kept loads bit for bit, and nothing is found that does not."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch

import shardckpt
from shardckpt import CheckpointManager, KeepEverySteps, KeepLast
from shardckpt.errors import ShardckptError
from shardckpt.manager.backends import ShardedBackend
from shardckpt.manager.retention import Retention
from shardckpt.state import file_groups as kinds
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import System
from tests.faults import crash
from tests.faults.crash import FOLDER, FROZEN, state_of
from tests.faults.disk import Content, Disk, Mark, ProcessDied

STEP = 100
"""Version v is that of step v // STEP: more than one, where a step is saved again."""


def policies(every: int = 3) -> tuple[Retention, ...]:
    return KeepLast(2), KeepEverySteps(every)


def kept(steps: Iterable[int], *, every: int = 3) -> set[int]:
    """Return the steps that policies() keep. Computed here again, independently of the package."""
    ordered = sorted(steps)
    return {*ordered[-2:], *(step for step in ordered if step % every == 0)}


class Job:
    """A job that saves into a folder, by step. `mark` notes on its disk, a System, which saves have
    begun and which are acknowledged."""

    def __init__(
        self,
        disk: Any,
        *,
        folder: str = FOLDER,
        elements: int = 300,
        asynchronous: bool = False,
        form: Callable[[Any], ShardedBackend] = ShardedBackend,
        keep: tuple[Retention, ...] | None = None,
    ) -> None:
        self.disk = disk
        self.folder = folder
        self.elements = elements
        self.asynchronous = asynchronous
        self.format = form(LocalStorage(disk))
        self.keep = keep or policies()
        self.version = 0
        self.start()

    def start(self) -> None:
        """As a process does that has found nothing out yet."""
        self.manager = CheckpointManager(
            self.folder, keep=self.keep, asynchronous=self.asynchronous, backend=self.format
        )

    def save(self, *, again: bool = False) -> None:
        """Save the next step, or the last one again; then remove what need not stay."""
        step = self.version // STEP
        self.version = self.version + 1 if again else (step + 1) * STEP
        self.disk.mark("begun", self.version)
        with mock.patch.object(kinds, "FROZEN_FILE_BYTES", 1):
            self.manager.save(
                self.version // STEP,
                # Frozen tensors are linked from one checkpoint to the next.
                {**state_of(self.version, elements=self.elements), "frozen": FROZEN},
                if_exists="overwrite",
            )
            self.manager.wait()
        self.disk.mark("acknowledged", self.version)

    def killed(self, at: int) -> bool:
        """A save whose process dies at its system call number `at`; whether it made so many."""
        self.disk.die_at = self.disk.calls + at
        try:
            self.save()
            return False
        except ProcessDied:
            return True
        finally:
            self.disk.restart()
            self.start()

    def failed(self, at: int, code: int) -> None:
        """A save one of whose system calls fails."""
        self.disk.fail_at = (self.disk.calls + at, code)
        with warnings.catch_warnings(), mock.patch.object(self.disk, "fail_for_ever", False):
            warnings.simplefilter("ignore")
            try:
                self.save()
            except ShardckptError:
                pass
        self.disk.restart()
        self.start()


def versions_at(disk: System, folder: str = FOLDER) -> dict[int, int]:
    """The version of each step that a manager finds; AssertionError for one that is broken."""
    checkpoints, broken = CheckpointManager(
        folder, backend=ShardedBackend(LocalStorage(disk))
    )._scan()
    assert not broken, f"not whole: {broken}"
    found = {}
    for checkpoint in checkpoints:
        state = shardckpt.load_state(checkpoint.path, storage=LocalStorage(disk))
        version = int(state["step"])
        expected = state_of(version, elements=len(state["w"]))
        assert torch.equal(state["w"], expected["w"]), f"{version} with other tensors"
        assert torch.equal(state["b"], expected["b"]), f"{version} with other tensors"
        frozen = state["frozen"]["weight"]
        assert torch.equal(frozen, FROZEN.weight), f"{version} with other frozen weights"
        assert version // STEP == checkpoint.step, f"version {version} as {checkpoint.step}"
        found[checkpoint.step] = version
    return found


def check_state(marks: list[Mark], content: Content, *, again: bool, can_exchange: bool) -> None:
    """The oracle, for crash.check."""
    begun = {mark.version for mark in marks if mark.kind == "begun"}
    acknowledged: dict[int, int] = {}
    for mark in marks:
        if mark.kind == "acknowledged":
            acknowledged[mark.version // STEP] = mark.version
    disk = Disk(content, can_exchange=can_exchange)
    found = versions_at(disk)
    assert set(found.values()) <= begun, f"{found} load, {begun} begun"
    assert_kept(found, set(acknowledged))
    for step in found.keys() & acknowledged.keys():
        assert found[step] >= acknowledged[step], f"{found} load, {acknowledged} acknowledged"
    if again:
        job = Job(disk)
        job.version = max(begun, default=0)
        job.save()
        assert_swept(disk, {*found, job.version // STEP})


def assert_kept(found: Iterable[int], acknowledged: set[int], *, every: int = 3) -> None:
    """Of what was acknowledged all is there that is to be kept, given what is there."""
    missing = (kept({*acknowledged, *found}, every=every) & acknowledged) - {*found}
    assert not missing, f"{missing} missing; {found} load, {acknowledged} were acknowledged"


def assert_swept(
    disk: System, steps: Iterable[int], *, folder: str = FOLDER, every: int = 3
) -> None:
    """After a save nothing is in the folder but what is to be kept of these steps."""
    names = [name for name in disk.listdir(folder) if not name.endswith(".lock")]
    assert set(names) == {f"step-{s}" for s in kept(steps, every=every)}, f"leftovers: {names}"


History = Callable[[Job], None]


def _five(job: Job) -> None:
    for _ in range(3):
        job.save()
    job.disk.settle()
    job.save()
    job.save()


def _again(job: Job) -> None:
    job.save()
    job.save()
    job.disk.settle()
    job.save(again=True)
    job.save()
    job.save()


HISTORIES: dict[str, tuple[History, bool, bool]] = {
    "retention": (_five, True, False),
    "async retention": (_five, True, True),
    "saved again, by two renames": (_again, False, False),
}
"""name -> (what happens, whether the disk can exchange names, whether saves are asynchronous)."""


def record(name: str, *, disk: type[Disk] = Disk, **options: object) -> Disk:
    """The disk after one of HISTORIES."""
    history, can_exchange, asynchronous = HISTORIES[name]
    made = disk(can_exchange=can_exchange)
    history(Job(made, asynchronous=asynchronous, **options))  # type: ignore[arg-type]
    return made


@functools.cache
def prepared() -> Content:
    """Three settled steps."""
    disk = Disk()
    job = Job(disk)
    for _ in range(3):
        job.save()
    return disk.content


def prepared_job(*, can_exchange: bool = True) -> Job:
    """A job that goes on from there."""
    disk = Disk(prepared().copy(), can_exchange=can_exchange)
    for step in (1, 2, 3):
        disk.mark("begun", step * STEP)
        disk.mark("acknowledged", step * STEP)
    disk.settle()
    job = Job(disk)
    job.version = 3 * STEP
    return job


def dead_job(at: int, *, can_exchange: bool = True) -> tuple[Disk, int] | None:
    """A save or removal that dies at a system call, and a job that follows it; and where in the
    log it died. None if it makes fewer calls."""
    job = prepared_job(can_exchange=can_exchange)
    if not job.killed(at):
        return None
    disk = job.disk
    died_at = len(disk.log)
    job.save()
    assert_swept(disk, versions_at(disk))
    return disk, died_at


def random_history(rng: random.Random) -> Disk:
    """The disk after some settled steps and some random ones, deaths and failures among them."""
    disk = Disk(can_exchange=rng.random() < 0.6)
    job = Job(disk, asynchronous=rng.random() < 0.2)
    for _ in range(rng.randint(0, 3)):
        job.save()
    disk.settle()
    for _ in range(rng.randint(1, 2)):
        at, code = rng.randint(1, 110), rng.choice([5, 28])
        actions: list[Callable[[], object]] = [
            job.save,
            lambda: job.save(again=True),
            lambda at=at: job.killed(at),
            lambda at=at, code=code: job.failed(at, code),
        ]
        rng.choice(actions)()
    job.save()
    return disk


def trial(seed: int) -> int:
    """A random history, of a path or of a job with retention, and a thousand or so of its crash
    states."""
    rng = random.Random(seed)
    if seed % 3:
        tried = crash.check(crash.random_history(rng), per_prefix=12, rng=rng)
    else:
        tried = crash.check(random_history(rng), per_prefix=6, rng=rng, oracle=check_state)
    assert not tried.failures, "\n".join(tried.failures[:5])
    return tried.states
