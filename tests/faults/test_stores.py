"""Object stores that fail, see tests/faults/stores.py; and faults in our code that it must see."""

from __future__ import annotations

import pytest

from shardckpt.storage import object_store
from shardckpt.storage.object_store import ObjectFiles, ObjectStorage, ObjectTransaction
from tests.faults import stores


@pytest.mark.parametrize("step", [7, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", stores.KINDS)
def test_some_requests_fail(kind, step):
    assert stores.every_fault([kind], step=step, begin=stores.KINDS.index(kind) % 3) > 5


@pytest.mark.parametrize("faults", [120, pytest.param(300, marks=pytest.mark.long)])
def test_requests_fail_at_random(faults):
    seen = stores.at_random(1, faults)
    assert seen.keys() == set(stores.KINDS) - {"late commits"}


def test_every_race_of_two_processes():
    assert stores.every_race() > 30


def unconditional(self, manifest):
    key = self._prefix + "manifest.json"
    self._may_delete = False
    self._objects.objects.put(key, manifest)


def hasty(self, manifest, commit=ObjectTransaction.commit):
    try:
        commit(self, manifest)
    except BaseException:
        self._may_delete = True
        raise


def trusting(self, manifest):
    """Takes every failed condition for another save."""
    self._may_delete = True
    try:
        self._objects.put_if(self._prefix + "manifest.json", manifest, replaces=self.replaces)
    except object_store.ConditionFailedError as error:
        raise self._lost() from error
    self._may_delete = False


def shards_first(self, path):
    objects, prefix = self.at(path)
    text, _ = object_store._get(objects, prefix + "manifest.json")
    if text is not None:
        object_store._delete_shards(objects, prefix, text)
        objects.delete([prefix + "manifest.json"])


def in_place(self, name, *, size_bytes, shared=False):
    self._take_name(name)
    return object_store.ObjectFile(
        self._objects, f"{self._prefix}{'0' * 32}/{name}", size_bytes=size_bytes
    )


@pytest.mark.parametrize(
    ("owner", "name", "instead", "seen"),
    [
        (ObjectTransaction, "commit", unconditional, stores.every_race),
        (ObjectTransaction, "commit", hasty, lambda: stores.every_fault(["late commits"])),
        (ObjectTransaction, "commit", trusting, lambda: stores.every_fault(["repeated"])),
        (ObjectStorage, "remove", shards_first, lambda: stores.every_fault(["killed"])),
        (object_store, "_id_of", lambda text: "0" * 32, lambda: stores.every_fault(["killed"])),
        (ObjectFiles, "_missing", lambda self, name: None, stores.every_race),
    ],
    ids=[
        "no condition",
        "deletes in doubt",
        "trusts a 412",
        "shards first",
        "another id",
        "an untyped error",
    ],
)
def test_planted_faults_are_seen(monkeypatch, owner, name, instead, seen):
    monkeypatch.setattr(owner, name, instead)
    with pytest.raises(Exception):  # noqa: B017
        seen()
