"""Requests of an object store get the same answers in memory and from a server."""

from __future__ import annotations

import pytest

from shardckpt.errors import StorageError
from shardckpt.storage.memory import MemoryObjects
from shardckpt.storage.object_clients import ClientObjects
from shardckpt.storage.objects import ConditionFailedError, NoObjectError


@pytest.fixture(params=["memory", "server"])
def objects(request):
    """The objects of a bucket, and the prefix of the keys of a test."""
    if request.param == "memory":
        return MemoryObjects("memory://bucket"), "run/"
    bucket, _, prefix = request.getfixturevalue("s3").removeprefix("s3://").partition("/")
    return ClientObjects(f"s3://{bucket}", {}), f"{prefix}/"


def put(objects, key: str, *parts: bytes) -> None:
    upload = objects.upload(key, size_bytes=sum(map(len, parts)))
    for part in parts:
        upload.write(part)
    upload.finish()


def test_an_uploaded_object_is_described_read_and_copied(objects):
    objects, prefix = objects
    put(objects, f"{prefix}a", b"abc", b"def")
    data, version = objects.get(f"{prefix}a")
    found = objects.head(f"{prefix}a")
    assert (data, found.key, found.size_bytes) == (b"abcdef", f"{prefix}a", 6)
    assert found.version == version
    assert found.modified_s > 1_700_000_000
    assert bytes(objects.read(f"{prefix}a", offset=2, size_bytes=3)) == b"cde"
    objects.copy(f"{prefix}a", f"{prefix}b")
    assert objects.get(f"{prefix}b")[0] == b"abcdef"


def test_memory_may_change_after_a_write_to_an_upload(objects):
    objects, prefix = objects
    memory = bytearray(b"abc")
    upload = objects.upload(f"{prefix}a", size_bytes=3)
    upload.write(memoryview(memory))
    memory[:] = b"xyz"
    upload.finish()
    assert objects.get(f"{prefix}a")[0] == b"abc"


@pytest.mark.parametrize(
    ("offset", "size_bytes", "expected"), [(4, 9, b"ef"), (6, 3, b""), (9, 3, b""), (2, 0, b"")]
)
def test_a_read_returns_fewer_bytes_only_at_the_end(objects, offset, size_bytes, expected):
    objects, prefix = objects
    put(objects, f"{prefix}a", b"abcdef")
    assert bytes(objects.read(f"{prefix}a", offset=offset, size_bytes=size_bytes)) == expected


def test_an_object_that_does_not_exist(objects):
    objects, prefix = objects
    key = f"{prefix}nothing"
    assert objects.head(key) is None
    for request in (
        lambda: objects.get(key),
        lambda: objects.read(key, offset=0, size_bytes=1),
        lambda: objects.copy(key, f"{prefix}copy"),
    ):
        with pytest.raises(NoObjectError):
            request()
    objects.delete([key, f"{prefix}other"])
    assert list(objects.list(prefix)) == []


def test_a_put_under_a_condition_changes_nothing_unless_it_holds(objects):
    objects, prefix = objects
    key = f"{prefix}manifest.json"
    with pytest.raises((ConditionFailedError, StorageError)):
        objects.put_if(key, b"0", replaces=_version_of_nothing(objects, f"{prefix}other"))
    assert objects.head(key) is None
    first = objects.put_if(key, b"1", replaces=None)
    with pytest.raises(ConditionFailedError):
        objects.put_if(key, b"2", replaces=None)
    second = objects.put_if(key, b"2", replaces=first)
    with pytest.raises(ConditionFailedError):
        objects.put_if(key, b"3", replaces=first)
    assert objects.get(key) == (b"2", second)
    assert first != second


def _version_of_nothing(objects, key: str) -> str:
    version = objects.put_if(key, b"x", replaces=None)
    objects.delete([key])
    return version


def test_lists_have_whole_folders_and_deletions_only_their_keys(objects):
    objects, prefix = objects
    for key in ("a/1", "a/2", "ab/1", "b", "c/d/1"):
        put(objects, f"{prefix}{key}", b"x")
    assert sorted(objects.folders(prefix)) == ["a", "ab", "c"]
    assert sorted(found.key for found in objects.list(f"{prefix}a/")) == [
        f"{prefix}a/1",
        f"{prefix}a/2",
    ]
    objects.delete([f"{prefix}a/1", f"{prefix}b"])
    keys = sorted(found.key.removeprefix(prefix) for found in objects.list(prefix))
    assert keys == ["a/2", "ab/1", "c/d/1"]


def test_a_cancelled_upload_leaves_no_object(objects):
    objects, prefix = objects
    upload = objects.upload(f"{prefix}a", size_bytes=6)
    upload.write(b"abc")
    upload.cancel()
    assert objects.head(f"{prefix}a") is None
