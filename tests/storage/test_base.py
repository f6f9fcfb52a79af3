"""The defaults of the base classes of a storage."""

from __future__ import annotations

import pytest

import shardckpt
from shardckpt.errors import CheckpointNotFoundError, StateError
from shardckpt.storage.base import (
    CheckpointFiles,
    Storage,
    WouldWait,
    WritableFile,
    WriteTransaction,
)


class Files(CheckpointFiles):
    path = "here"

    def manifest(self):
        return b"m"

    def size_bytes(self, name):
        return 4

    def read(self, name, buffer, *, offset):
        buffer[:] = b"abcd"[offset : offset + len(buffer)]


class ReadOnly(Storage):
    def open(self, path):
        return Files()


def test_the_defaults_of_files():
    files = ReadOnly().open("here")
    filled = []
    buffers = [memoryview(bytearray(1)), memoryview(bytearray(2))]
    files.readinto("s", buffers, offset=1, on_filled=lambda buffer: filled.append(bytes(buffer)))
    assert filled == [b"b", b"cd"]
    with pytest.raises(WouldWait):
        files.readinto("s", buffers, offset=1, wait=False)
    files.in_memory = True
    files.readinto("s", buffers, offset=0, wait=False)
    assert bytes(buffers[1]) == b"bc"
    assert not files.read_past_cache("s", buffers[0], offset=0, size_bytes=1)
    assert bytes(files.map("s")) == b"abcd"
    files.duplicate().close()


def test_a_storage_without_begin_refuses_a_save():
    with pytest.raises(StateError, match="can't be written to"):
        shardckpt.save({"a": 1}, "here", storage=ReadOnly())


def test_a_read_only_storage_refuses_all_else_by_name():
    storage = ReadOnly()
    calls = {
        "can't be written to": lambda: storage.begin("c", checkpoint_id="0", overwrite=False),
        "can't list a folder": lambda: storage.names("c"),
        "can't remove": lambda: storage.remove("c"),
    }
    for message, call in calls.items():
        with pytest.raises(StateError, match=message) as raised:
            call()
        assert (raised.value.path, raised.value.actual) == ("c", "ReadOnly")
        assert raised.value.remedy == "use another storage, such as a LocalStorage"
    for call in (
        lambda: storage.join("c", token="0"),
        lambda: storage.join_part("c", token="0"),
        lambda: storage.assemble("c", checkpoint_id="0", overwrite=False),
    ):
        with pytest.raises(StateError, match="can't be written to"):
            call()


def test_the_defaults_of_a_storage():
    class Absent(ReadOnly):
        def open(self, path):
            raise CheckpointNotFoundError("absent", path=path)

    storage = ReadOnly()
    assert storage.full_path("a/b") == "a/b"
    assert storage.child("a/", "b") == storage.child("a", "b") == "a/b"
    assert storage.exists("here")
    assert not Absent().exists("here")
    assert isinstance(storage.open_newest("here"), Files)
    assert isinstance(storage.open_part("here", b"m"), Files)
    assert storage.tiers("here") == {}
    for nothing in (storage.sweep, storage.remove_part):
        assert nothing("here") is None
    assert storage.wait_for_tier("here", 0) is None
    with pytest.raises(StateError, match="Invalid path"):
        storage.full_path("")


def test_the_version_of_a_checkpoint_is_that_of_its_manifest_and_closes_the_files():
    closed = []

    class Closing(Files):
        text = b"m"

        def manifest(self):
            return self.text

        def close(self):
            closed.append(self)

    class Versioned(Storage):
        def open(self, path):
            return Closing()

    storage = Versioned()
    before = storage.version("c")
    assert storage.version("c") == before
    Closing.text = b"another"
    assert storage.version("c") != before
    assert len(closed) == 3


def test_a_transaction_takes_nothing_over_by_default():
    class Transaction(WriteTransaction):
        def create(self, name, *, size_bytes, shared=False):
            raise NotImplementedError

        def commit(self, manifest):
            raise NotImplementedError

        def abandon(self):
            pass

    class File(WritableFile):
        def write(self, data, *, offset):
            pass

        def close(self, *, size_bytes):
            pass

        def discard(self):
            pass

    transaction = Transaction()
    assert not transaction.has("s", size_bytes=4)
    assert not transaction.link("s", Files())
    assert transaction.create_from("s", Files(), size_bytes=4) is None
    assert not File().clone(offset=0, size_bytes=4)
    assert transaction.shares_files
    assert not transaction.resumes
    assert not transaction.commits_part
    assert not transaction.tiers
    transaction.close()
