"""Histories of a checkpoint path, recorded on a simulated disk, and the oracle for what a crash
leaves: a whole version, none older than the newest that was acknowledged."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

import shardckpt
from shardckpt.errors import CheckpointNotFoundError, ShardckptError, StorageError
from shardckpt.maintenance.reshard import reshard
from shardckpt.state import file_groups as kinds
from shardckpt.storage import deletion
from shardckpt.storage.local import LocalStorage
from tests.faults.crash_states import crash_states
from tests.faults.disk import Content, Disk, Mark, ProcessDied

FOLDER = "/no-such-folder/runs"
PATH = f"{FOLDER}/c"
FROZEN = nn.Linear(20, 20).requires_grad_(False)
LARGE = torch.arange(280_000.0)  # more than a block


def state_of(version: int, *, elements: int = 300) -> dict[str, object]:
    """Return the state of a version. Every element differs from that of other versions."""
    numbers = torch.arange(elements, dtype=torch.float32)
    return {"w": numbers + 1000 * version, "b": torch.full((3,), version), "step": version}


def version_at(disk: Disk, path: str = PATH) -> int | None:
    """The version that a load finds, None if there is none; AssertionError for a mixture."""
    try:
        found = shardckpt.load_state(path, storage=LocalStorage(disk))
    except CheckpointNotFoundError:
        return None
    version = found["step"]
    expected = state_of(version, elements=len(found["w"]))
    assert torch.equal(found["w"], expected["w"]), f"version {version} with other tensors"
    assert torch.equal(found["b"], expected["b"]), f"version {version} with other tensors"
    assert torch.equal(found.get("a", LARGE), LARGE), f"version {version} with other tensors"
    return version


class Run:
    """A history under way: every action writes the next version to PATH and marks it."""

    def __init__(self, disk: Disk, storage: LocalStorage | None = None, *, elements: int = 300):
        self.disk = disk
        self.storage = storage or LocalStorage(disk)
        self.elements = elements
        self.version = 0

    def next_state(self) -> dict[str, object]:
        self.version += 1
        self.disk.mark("begun", self.version)
        return state_of(self.version, elements=self.elements)

    def acknowledge(self) -> None:
        self.disk.mark("acknowledged", self.version)

    def save(self) -> None:
        shardckpt.save(self.next_state(), PATH, overwrite=True, storage=self.storage)
        self.acknowledge()

    def async_save(self) -> None:
        state = self.next_state()
        shardckpt.async_save(state, PATH, overwrite=True, storage=self.storage).result(60)
        self.acknowledge()

    def based_save(self, base: str = PATH, path: str = PATH) -> None:
        """A save that takes its frozen weights over from a base, if that has them."""
        state = self.next_state() if path == PATH else state_of(0, elements=self.elements)
        with mock.patch.object(kinds, "FROZEN_FILE_BYTES", 1):
            shardckpt.save(
                {**state, "frozen": FROZEN},
                path,
                overwrite=True,
                base=base,
                storage=self.storage,
            )
        if path == PATH:
            self.acknowledge()

    def cloning_save(self) -> None:
        """A save that takes the first block of its only file over from the checkpoint that it
        replaces, if there is one."""
        state = {**self.next_state(), "a": LARGE}
        base = PATH if self.version > 1 else None
        shardckpt.save(state, PATH, overwrite=True, base=base, storage=self.storage)
        self.acknowledge()

    def reshard(self, shards: int = 3) -> None:
        source = f"{FOLDER}-of-sources/{self.version}"
        state = state_of(self.version + 1, elements=self.elements)
        shardckpt.save(state, source, storage=LocalStorage(self.disk))
        self.next_state()
        with shardckpt.open_checkpoint(source, storage=LocalStorage(self.disk)) as opened:
            reshard(opened, PATH, shards=shards, storage=self.storage, overwrite=True)
        self.acknowledge()

    def killed(self, at: int) -> bool:
        """A save whose process dies at its system call number `at`, if it makes so many; whether
        it died. The machine goes on."""
        self.disk.die_at = self.disk.calls + at
        try:
            self.save()
            return False
        except ProcessDied:
            return True
        finally:
            self.disk.restart()

    def failed(self, at: int, code: int) -> None:
        """A save one of whose system calls fails."""
        self.disk.fail_at = (self.disk.calls + at, code)
        try:
            self.save()
        except StorageError:
            pass
        self.disk.restart()


@dataclass(frozen=True, slots=True)
class Tried:
    """How many crash states were loaded, and what went wrong, as text."""

    states: int
    failures: list[str]


def check_state(marks: list[Mark], content: Content, *, again: bool, can_exchange: bool) -> None:
    """The oracle for one path; with `again` the next save too."""
    begun = max((mark.version for mark in marks if mark.kind == "begun"), default=0)
    acknowledged = max((mark.version for mark in marks if mark.kind == "acknowledged"), default=0)
    disk = Disk(content, can_exchange=can_exchange)
    found = version_at(disk) or 0
    assert acknowledged <= found <= begun, f"version {found} loaded"
    if again:
        run = Run(disk)
        run.version = begun
        run.save()
        assert version_at(disk) == begun + 1, "the next save does not load"
        left = [name for name in disk.listdir(FOLDER) if name.startswith(".")]
        assert not left, f"leftovers: {left}"


def check(
    disk: Disk,
    *,
    per_prefix: int,
    rng: random.Random,
    since: int = 0,
    oracle: Callable[..., None] = check_state,
    enough: int = sys.maxsize,
) -> Tried:
    """Load crash states of a recorded history, and save again over a few of them; until `enough`
    have failed."""
    tried, failures = 0, []
    for marks, content in crash_states(disk, per_prefix=per_prefix, rng=rng, since=since):
        tried += 1
        try:
            oracle(marks, content, again=tried % 16 == 0, can_exchange=disk.can_exchange)
        except (AssertionError, ShardckptError, OSError) as error:
            failures.append(f"{_story(marks)}: {type(error).__name__}: {error}")
            if len(failures) >= enough:
                break
    return Tried(tried, failures)


def _story(marks: list[Mark]) -> str:
    return "crash after " + (", ".join(f"{m.kind} {m.version}" for m in marks) or "nothing")


History = Callable[[Run], None]


def _replaced(run: Run) -> None:
    run.save()
    run.disk.settle()
    run.save()


def _based_on_itself(run: Run) -> None:
    run.based_save()
    run.disk.settle()
    run.based_save()
    run.based_save()


def _cloned(run: Run) -> None:
    run.cloning_save()
    run.disk.settle()
    run.cloning_save()


def _base_removed(run: Run) -> None:
    base = f"{FOLDER}-of-bases/c"
    run.based_save(path=base)
    run.based_save(base)
    deletion.remove(run.disk, base)
    run.based_save()


HISTORIES: dict[str, tuple[History, bool]] = {
    "save": (lambda run: run.save(), True),
    "replace": (_replaced, True),
    "replace by two renames": (_replaced, False),
    "async": (lambda run: (run.async_save(), run.async_save()), True),
    "reshard": (lambda run: (run.save(), run.reshard()), True),
    "based on what it replaces": (_based_on_itself, True),
    "base removed": (_base_removed, True),
    "blocks of what it replaces": (_cloned, True),
}
"""name -> (what happens, whether the disk can exchange names)."""


def record(
    name: str, *, disk: type[Disk] = Disk, storage: Callable[[Disk], LocalStorage] = LocalStorage
) -> Disk:
    """The disk after one of HISTORIES."""
    history, can_exchange = HISTORIES[name]
    made = disk(can_exchange=can_exchange)
    history(Run(made, storage(made)))
    return made


def dead_save(at: int, *, replacing: bool, can_exchange: bool) -> tuple[Disk, int] | None:
    """A save that dies at a system call, and one that follows it; and where in the log it died.
    None if it makes fewer calls."""
    disk = Disk(can_exchange=can_exchange)
    run = Run(disk, elements=1)
    if replacing:
        run.save()
        disk.settle()
    if not run.killed(at):
        return None
    died_at = len(disk.log)
    run.save()
    return disk, died_at


def random_history(rng: random.Random, *, disk: type[Disk] = Disk) -> Disk:
    """The disk after a settled version and some random actions, deaths and failures among them."""
    made = disk(can_exchange=rng.random() < 0.6)
    run = Run(made, elements=rng.choice([1, 300, 5000]))
    if rng.random() < 0.8:
        run.save()
        made.settle()
    for _ in range(rng.randint(1, 2)):
        at, code = rng.randint(1, 45), rng.choice([5, 28])
        action = rng.choice(
            [
                run.save,
                run.async_save,
                run.based_save,
                lambda: run.reshard(rng.randint(1, 4)),
                lambda at=at: run.killed(at),
                lambda at=at: run.killed(at),
                lambda at=at, code=code: run.failed(at, code),
            ]
        )
        action()
    run.save()
    return made
