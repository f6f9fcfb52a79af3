"""The defaults of the storage classes, and the storage on the page docs/how-to/storage.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.errors import StateError
from shardckpt.storage.base import CheckpointFiles, Storage, WouldWait
from shardckpt.testing import StorageTests
from tests.docs_code import blocks

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "storage.md"
(CODE,) = [block.code for block in blocks(PAGE.read_text()) if block.title == "dict_storage.py"]
NAMES: dict[str, type] = {}
exec(CODE, NAMES)
DictStorage = NAMES["DictStorage"]


class TestDictStorage(StorageTests):
    @pytest.fixture
    def storage(self):
        return DictStorage()

    @pytest.fixture
    def path(self, tmp_path):
        return str(tmp_path / "checkpoint")


def test_it_stores_all_that_the_library_writes():
    storage = DictStorage()
    state = {"w": torch.arange(300_000.0), "v": torch.ones(3, dtype=torch.int8), "step": 1}
    shardckpt.save(state, "a", storage=storage)
    shardckpt.save(state, "a", storage=storage, overwrite=True, base="a")
    shardckpt.async_save({**state, "step": 2}, "b", storage=storage).result(60)
    for device in ("cpu", "disk"):
        loaded = shardckpt.load_state("b", storage=storage, device_map=device)
        assert torch.equal(loaded["w"], state["w"])
        assert loaded["step"] == 2
    with shardckpt.open_checkpoint("b", storage=storage) as checkpoint:
        checkpoint.verify()
        assert checkpoint["w"][7:9].tolist() == [7, 8]


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
