"""The defaults of the base classes of a storage."""

from __future__ import annotations

import pytest

import shardckpt
from shardckpt.errors import StateError
from shardckpt.storage.base import (
    CheckpointFiles,
    Storage,
    WouldWait,
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
