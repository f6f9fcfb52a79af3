"""Every state that a crash may leave of saves, replacing saves, async saves, resharding, and the
collection of what dead saves left: each loads as the old or the new checkpoint."""

from __future__ import annotations

import itertools
import os
import random

import pytest

import shardckpt
from shardckpt.storage import deletion, local
from shardckpt.storage.local import LocalStorage, LocalTransaction
from shardckpt.storage.names import hidden_path
from shardckpt.storage.posix import System
from tests.faults import crash
from tests.faults.disk import Data, Disk, Names

SEED = 1


@pytest.mark.parametrize(
    ("per_prefix", "least"), [(4, 24), pytest.param(16, 100, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", crash.HISTORIES)
def test_crash_states_of_a_save_can_be_loaded(name, per_prefix, least):
    tried = crash.check(crash.record(name), per_prefix=per_prefix, rng=random.Random(SEED))
    assert not tried.failures, "\n".join(tried.failures[:5])
    assert tried.states > least


@pytest.mark.parametrize(
    "seed", [SEED, *(pytest.param(SEED + n, marks=pytest.mark.long) for n in range(1, 4))]
)
def test_crash_states_of_random_histories(seed):
    rng = random.Random(seed)
    tried = crash.check(crash.random_history(rng), per_prefix=8, rng=rng)
    assert not tried.failures, "\n".join(tried.failures[:5])


@pytest.mark.parametrize("step", [8, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("replacing", "can_exchange"), [(False, True), (True, True), (True, False)]
)
def test_crash_states_after_a_dead_save(replacing, can_exchange, step):
    """A process died at a system call, one in `step`, another one saved, then the machine
    crashed. scripts/torture lets it die anywhere."""
    failures = []
    for at in itertools.count(1, step):
        history = crash.dead_save(at, replacing=replacing, can_exchange=can_exchange)
        if history is None:
            break
        disk, since = history
        rng = random.Random(SEED + at)
        failures += crash.check(disk, per_prefix=3, rng=rng, since=since).failures
    assert not failures, "\n".join(failures[:5])
    assert at > 20


def with_notes(*, can_exchange: bool) -> Disk:
    """A disk on which a checkpoint is replaced beside whose shards the user has laid a file."""
    disk = Disk(can_exchange=can_exchange)
    run = crash.Run(disk)
    run.save()
    fd = disk.open(f"{crash.PATH}/notes.txt", os.O_CREAT | os.O_WRONLY)
    disk.write(fd, memoryview(b"precious"), offset=0)
    disk.settle()
    run.save()
    return disk


def notes_kept(marks, content, *, again, can_exchange):
    """The oracle: crash.check_state, and the file is there before and after the next save."""

    def notes(disk: Disk) -> bytes:
        try:
            at = disk._inode(crash.PATH)
        except FileNotFoundError:
            at = disk._inode(hidden_path(crash.PATH, "old"))
        return disk.content.files[disk._inode("notes.txt", at)]

    disk = Disk(content, can_exchange=can_exchange)
    try:
        assert notes(disk) == b"precious"
        crash.check_state(marks, content, again=again, can_exchange=can_exchange)
        assert notes(disk) == b"precious"
    except FileNotFoundError as error:
        raise AssertionError("the file is gone") from error


@pytest.mark.parametrize(
    ("per_prefix", "least"), [(6, 36), pytest.param(16, 100, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_file_of_the_user_survives(can_exchange, per_prefix, least):
    disk = with_notes(can_exchange=can_exchange)
    tried = crash.check(disk, per_prefix=per_prefix, rng=random.Random(SEED), oracle=notes_kept)
    assert not tried.failures, "\n".join(tried.failures[:5])
    assert tried.states > least


def test_a_file_of_the_user_that_is_lost_is_seen(monkeypatch):
    monkeypatch.setattr(local, "foreign_names", lambda *args, **kwargs: [])
    monkeypatch.setattr(deletion, "foreign_names", lambda *args, **kwargs: [])
    tried = crash.check(
        with_notes(can_exchange=True), per_prefix=2, rng=random.Random(SEED), oracle=notes_kept
    )
    assert tried.failures


def test_every_system_call_is_simulated():
    calls = {name for name in vars(System) if not name.startswith("_")}
    assert calls <= set(vars(Disk))


def careless(without: str) -> type[Disk]:
    """A disk under an engine that forgets one kind of fsync."""

    class Careless(Disk):
        def fsync(self, fd: int) -> None:
            found = [
                name
                for names in self.content.directories.values()
                for name, inode in names.items()
                if inode == self.descriptors[fd]
            ]
            kind = found[0].split("-")[0] if found else ""
            if kind != without:
                super().fsync(fd)

    return Careless


class InPlace(LocalStorage):
    """Writes under the final name."""

    def begin(self, path, *, checkpoint_id, overwrite):
        transaction = super().begin(path, checkpoint_id=checkpoint_id, overwrite=overwrite)
        self.system.rmdir(transaction._temporary)
        try:
            for name in self.system.listdir(path):
                self.system.unlink(f"{path}/{name}")
        except FileNotFoundError:
            self.system.mkdir(path)
        transaction._temporary = path
        transaction._publish = lambda: None
        return transaction


class Early(LocalStorage):
    """Commits only when the next save begins, so an acknowledged checkpoint is missing."""

    late = None

    def begin(self, path, *, checkpoint_id, overwrite):
        if self.late:
            LocalTransaction.commit(*self.late)
        transaction = super().begin(path, checkpoint_id=checkpoint_id, overwrite=overwrite)
        transaction.commit = lambda manifest: setattr(self, "late", (transaction, manifest))
        lock, transaction._lock = transaction._lock, None
        lock.release()
        transaction._lock = lock
        transaction.close = lambda: None
        return transaction


PLANTED = {
    "no shard fsync": (careless("shard"), LocalStorage),
    "no manifest fsync": (careless("manifest.json"), LocalStorage),
    "no fsync of the temporary directory": (careless(".c.tmp"), LocalStorage),
    "no fsync of the parent": (careless("runs"), LocalStorage),
    "writing in place": (Disk, InPlace),
    "acknowledging early": (Disk, Early),
}


@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("name", ["save", pytest.param("replace", marks=pytest.mark.long)])
def test_planted_bugs_are_seen(name, bug):
    disk, storage = PLANTED[bug]
    recorded = crash.record(name, disk=disk, storage=storage)
    tried = crash.check(recorded, per_prefix=32, rng=random.Random(SEED), enough=1)
    assert tried.failures, f"{tried.states} states, and none shows it"


class Moves(Disk):
    """A disk whose links take the name from where it was."""

    def link(self, name: str, target: str, *, dir_fd: int) -> None:
        super().link(name, target, dir_fd=dir_fd)
        self._change(Names(self.descriptors[dir_fd], ((name, None),)))


class Forgets(Disk):
    """A disk whose links are not durable: the data of a file stay with its first name."""

    def link(self, name: str, target: str, *, dir_fd: int) -> None:
        super().link(name, target, dir_fd=dir_fd)
        inode = self._inode(target)
        self.base.files.pop(inode, None)
        self.log = [e for e in self.log if not (isinstance(e, Data) and e.inode == inode)]


@pytest.mark.parametrize("name", ["based on what it replaces", "base removed"])
@pytest.mark.parametrize("disk", [Moves, Forgets])
def test_links_that_lose_something_are_seen(name, disk):
    recorded = crash.record(name, disk=disk)
    tried = crash.check(recorded, per_prefix=4, rng=random.Random(SEED), enough=1)
    assert tried.failures, f"{tried.states} states, and none shows it"


def test_the_histories_with_a_base_link():
    for name in ("based on what it replaces", "base removed"):
        linked = [
            inode
            for entry in crash.record(name).log
            if isinstance(entry, Names)
            for name, inode in entry.changes
            if "-frozen" in name and inode is not None
        ]
        assert len(linked) > len(set(linked)) > 0


def test_a_mixture_is_seen():
    disk = Disk()
    run = crash.Run(disk)
    mixed = {**crash.state_of(1), "w": crash.state_of(2)["w"]}
    shardckpt.save(mixed, crash.PATH, storage=run.storage)
    with pytest.raises(AssertionError, match="other tensors"):
        crash.version_at(disk)
