"""Every state that a crash may leave of a job that removes old checkpoints: kept checkpoints
load, removed ones are absent or complete, and the next save leaves no other files."""

from __future__ import annotations

import random

import pytest

from shardckpt import KeepLast
from shardckpt.manager.backends import ShardedBackend
from shardckpt.storage import deletion
from shardckpt.storage.names import hidden_path
from tests.faults import crash, retention
from tests.faults.disk import Disk
from tests.faults.test_crash_states import SEED, careless


def check(disk, *, per_prefix, since=0, seed=SEED, enough=99):
    return crash.check(
        disk,
        per_prefix=per_prefix,
        rng=random.Random(seed),
        since=since,
        oracle=retention.check_state,
        enough=enough,
    )


@pytest.mark.parametrize("name", retention.HISTORIES)
def test_crash_states_of_a_manager_can_be_loaded(name):
    tried = check(retention.record(name), per_prefix=3)
    assert not tried.failures, "\n".join(tried.failures[:5])
    assert tried.states > 100


def test_crash_states_after_a_death():
    """A process died at some system call of a save or of the removal after it, another one went
    on, then the machine crashed."""
    failures, deaths = [], 0
    for at in range(1, 200, 46):
        history = retention.dead_job(at, can_exchange=at % 2 == 0)
        if history is None:
            break
        disk, since = history
        failures += check(disk, per_prefix=1, since=since, seed=at).failures
        deaths += 1
    assert not failures, "\n".join(failures[:5])
    assert deaths > 3


def in_place(system, path):
    deletion.remove_tree(system, path)


def at_ease(system, path):
    """The name goes, but not for good, before the files do."""
    hidden = hidden_path(path, "tmp-" + "0" * 32)
    system.rename(path, hidden)
    deletion.remove_tree(system, hidden)


class Hasty(ShardedBackend):
    """Removes the oldest before the new one is there."""

    def save(self, state, path, **options):
        for name in self.names(crash.FOLDER)[:-1]:
            self.remove(f"{crash.FOLDER}/{name}")
        return super().save(state, path, **options)


@pytest.mark.parametrize(
    ("what", "instead"),
    [("remove", in_place), ("remove", at_ease), ("sweep", lambda system, folder: None)],
    ids=["removal in place", "no fsync before the files go", "no sweep"],
)
def test_planted_removals_are_seen(monkeypatch, what, instead):
    monkeypatch.setattr(deletion, what, instead)
    tried = check(retention.record("retention"), per_prefix=8, enough=1)
    assert tried.failures, f"{tried.states} states, and none shows it"


@pytest.mark.parametrize(
    "options",
    [{"form": Hasty}, {"keep": (KeepLast(1),)}, {"disk": careless("runs")}],
    ids=["removal before the save", "another policy", "no fsync of the folder"],
)
def test_planted_bugs_are_seen(options):
    tried = check(retention.record("retention", **options), per_prefix=3, enough=1)
    assert tried.failures, f"{tried.states} states, and none shows it"


def test_a_checkpoint_set_aside_is_found():
    """Without an exchange of names a step that is saved again has no name for a moment."""
    disk = Disk(can_exchange=False)
    job = retention.Job(disk)
    job.save()
    disk.rename(f"{crash.FOLDER}/step-1", hidden_path(f"{crash.FOLDER}/step-1", "old"))
    assert retention.versions_at(disk) == {1: retention.STEP}
    job.start()
    job.save()
    assert retention.versions_at(disk) == {1: retention.STEP, 2: 2 * retention.STEP}
    retention.assert_swept(disk, [1, 2])
