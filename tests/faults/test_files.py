"""Crash states, failing calls, damage and kills of single files, components and what convert
writes."""

from __future__ import annotations

import functools
import itertools
import random

import pytest

from shardckpt.storage import atomic_write
from shardckpt.storage.atomic_write import AtomicWrite
from shardckpt.storage.local import LocalFile
from tests.faults import crash, errnos, files
from tests.faults.disk import Disk

SEED = 1


def checked(kind: str, disk: Disk, **options: object) -> crash.Tried:
    oracle = functools.partial(files.check_state, kind)
    return crash.check(disk, rng=random.Random(SEED), oracle=oracle, **options)


@pytest.mark.parametrize(
    ("per_prefix", "least"), [(2, 12), pytest.param(6, 40, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("kind", files.KINDS)
def test_crash_states_of_a_file_can_be_loaded(kind, can_exchange, per_prefix, least):
    disk = files.replaced(kind, can_exchange=can_exchange)
    tried = checked(kind, disk, per_prefix=per_prefix)
    assert not tried.failures, "\n".join(tried.failures[:5])
    assert tried.states > least


@pytest.mark.parametrize(
    ("kind", "step", "can_exchange"),
    [
        ("torch", 7, True),
        ("components", 67, False),
        *(
            pytest.param(*job, marks=pytest.mark.long)
            for job in (
                ("torch", 3, True),
                ("torch", 5, False),
                ("to hf", 7, True),
                ("components", 19, False),
            )
        ),
    ],
)
def test_crash_states_after_a_dead_save(kind, step, can_exchange):
    failures = []
    for at in itertools.count(2, step):
        disk = Disk(can_exchange=can_exchange)
        run = files.Run(disk, kind, elements=1)
        run.save()
        disk.settle()
        if not run.killed(at):
            break
        since = len(disk.log)
        run.save()
        failures += checked(kind, disk, per_prefix=2, since=since).failures
    assert not failures, "\n".join(failures[:5])
    assert at > 20


def careless(kind: str) -> type[Disk]:
    """A disk under writers that forget the fsync of one kind of inode."""

    class Careless(Disk):
        def fsync(self, fd: int) -> None:
            inode = self.descriptors[fd]
            directory = inode in self.content.directories
            held = self.content.directories.values()
            name = next((n for names in held for n, i in names.items() if i == inode), "")
            found = "folder above" if name == "runs" else "folder" if directory else "file"
            if found != kind or not name or name.endswith(".lock"):
                super().fsync(fd)

    return Careless


@pytest.mark.parametrize("forgotten", ["file", "folder above"])
@pytest.mark.parametrize("kind", ["torch", "safetensors", "to hf"])
def test_a_forgotten_fsync_is_seen(kind, forgotten):
    """Planted faults."""
    disk = files.replaced(kind, disk=careless(forgotten))
    assert checked(kind, disk, per_prefix=16, enough=1).failures


def test_a_forgotten_fsync_of_the_new_folder_is_seen():
    disk = files.replaced("safetensors components", disk=careless("folder"))
    assert checked("safetensors components", disk, per_prefix=6, enough=1).failures


def test_writing_in_place_is_seen(monkeypatch):
    """A planted fault."""
    made = AtomicWrite.__init__

    def in_place(self, system, target, *arguments, **options):
        made(self, system, target, *arguments, **options)
        self.path = target
        self.publish = self.check_target = lambda: None
        self._to_remove = []
        if atomic_write.exists(system, target):
            system.unlink(target)

    monkeypatch.setattr(AtomicWrite, "__init__", in_place)
    disk = files.replaced("torch")
    monkeypatch.undo()
    assert checked("torch", disk, per_prefix=16, enough=1).failures


def test_leftovers_that_nobody_collects_are_seen(monkeypatch):
    """A planted fault."""
    monkeypatch.setattr(atomic_write, "_collect", lambda *_: False)
    left = []
    for at in range(20, 60, 4):
        disk = Disk()
        run = files.Run(disk, "torch")
        run.killed(at)
        run.save()
        left += files.leftovers(disk)
    assert left


@pytest.mark.parametrize("bug", ["leak", "untyped"])
def test_a_leak_and_an_untyped_error_are_seen(monkeypatch, bug):
    """Planted faults."""
    if bug == "leak":
        monkeypatch.setattr(LocalFile, "discard", lambda self: None)
    else:
        monkeypatch.setattr(atomic_write._Sink, "write", lambda self, data: 1 / 0)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        for at in range(1, 40):
            files.outcome("torch", at, errnos.CODES[0], for_ever=False)


@pytest.mark.parametrize("kind", files.SEALED)
def test_flipped_bits_of_a_file_are_detected(kind):
    files.try_flips(kind, random.Random(SEED).sample(files.all_bits(kind), 100))


def test_a_reader_that_does_not_verify_would_be_seen(monkeypatch):
    """A planted fault."""
    from shardckpt.convert import safetensors_files

    monkeypatch.setattr(safetensors_files, "check_sealed", lambda path: None)
    ((_, data),) = files.a_file("safetensors")
    with pytest.raises(AssertionError, match="other tensors"):
        files.try_flips("safetensors", [("c.safetensors", len(data) - 1, 3)])
