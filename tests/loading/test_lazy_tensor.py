"""Lazy tensors read only the blocks that are used, and only when they are used."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.posix import System


class Counting(System):
    """Counts the bytes that are read, and the files that are mapped."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self.mapped = 0

    def read(self, fd, buffers, *, offset, wait=True):
        count = super().read(fd, buffers, offset=offset, wait=wait)
        self.read_bytes += count
        return count

    def map(self, fd, *, size_bytes):
        self.mapped += 1
        return super().map(fd, size_bytes=size_bytes)


@pytest.fixture
def checkpoint(tmp_path):
    """Two shards; `large` lies in both, `whole` in one piece."""
    state = {
        "large": torch.arange(4 << 20, dtype=torch.float32).reshape(-1, 1024),
        "whole": torch.arange(100),
        "none": torch.empty(0, 3),
        "n": 5,
    }
    shardckpt.save(state, tmp_path / "one")
    arguments = [str(tmp_path / "one"), str(tmp_path / "two"), "--shards", "2"]
    assert main(["reshard", *arguments]) == 0
    return tmp_path / "two", state


@pytest.mark.parametrize("device_map", ["disk", "meta"])
def test_opening_reads_the_manifest_alone(checkpoint, device_map):
    path, saved = checkpoint
    system = Counting()
    state = shardckpt.load_state(path, device_map=device_map, storage=LocalStorage(system))
    assert system.read_bytes == (path / "manifest.json").stat().st_size
    assert system.mapped == (2 if device_map == "disk" else 0)
    assert state["n"] == 5
    for name in ("large", "whole", "none"):
        assert state[name].shape == saved[name].shape
        assert state[name].dtype == saved[name].dtype


def test_tensors_on_disk_are_like_others(checkpoint, tmp_path):
    path, saved = checkpoint
    state = shardckpt.load_state(path, device_map="disk")
    assert torch.equal(state["whole"], saved["whole"])
    assert torch.equal(state["large"] + 0, saved["large"])
    assert "DiskTensor" in repr(state["large"])
    state["whole"][0] = 77  # stays in memory
    assert shardckpt.load_state(path)["whole"][0] == 0
    shardckpt.save(state, path, overwrite=True)  # over what it is read from
    assert shardckpt.load_state(path)["whole"][0] == 77
    assert torch.equal(shardckpt.load_state(path)["large"], saved["large"])


def test_pieces_on_disk_are_verified_when_touched(checkpoint):
    path, _ = checkpoint
    state = shardckpt.load_state(path, device_map="disk")
    shard = next(path.glob("shard-00001*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    with open(shard, "r+b") as file:  # the mapped file itself
        file.write(data)
    with pytest.raises(errors.CorruptionError):
        state["large"] + 0


def test_a_part_of_the_state_costs_its_part(checkpoint):
    path, saved = checkpoint
    system = Counting()
    target = {"whole": torch.zeros(100, dtype=torch.int64)}
    report = shardckpt.load(target, path, storage=LocalStorage(system))
    manifest_bytes = (path / "manifest.json").stat().st_size
    assert report.bytes_read == 1 << 20  # the one block that holds it
    assert system.read_bytes == report.bytes_read + manifest_bytes
    assert torch.equal(target["whole"], saved["whole"])
    system = Counting()
    part = shardckpt.load_state(path, keys="n", storage=LocalStorage(system))
    assert part == {"n": 5}
    assert system.read_bytes == manifest_bytes


def test_rows_cost_their_blocks(checkpoint):
    path, saved = checkpoint
    system = Counting()
    with shardckpt.open_checkpoint(path, storage=LocalStorage(system)) as opened:
        system.read_bytes = 0
        rows = opened["large"][300:308]
    assert torch.equal(rows, saved["large"][300:308])
    assert system.read_bytes <= 2 << 20


def test_tensors_of_a_store_are_downloaded_once_when_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryObjects, "in_memory", False)  # as another machine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[int] = []
    whole_read = MemoryObjects.read

    def counted(objects, key, *, offset, size_bytes):
        read.append(size_bytes)
        return whole_read(objects, key, offset=offset, size_bytes=size_bytes)

    monkeypatch.setattr(MemoryObjects, "read", counted)
    storage = MemoryStorage()
    saved = {
        "large": torch.arange(3 << 20, dtype=torch.float32).reshape(-1, 1024),
        "half": torch.arange(2 << 20).to(torch.bfloat16),
        "none": torch.empty(0, 3),
        "one": torch.tensor(7),
    }
    shardckpt.save(saved, "memory://bucket/a", storage=storage)
    for attempt in range(2):
        state = shardckpt.load_state("memory://bucket/a", device_map="disk", storage=storage)
        assert not read, "nothing is read before it is touched"
        assert torch.equal(state["half"] + 0, saved["half"])
        assert sum(read) < 6 << 20
        for name, tensor in saved.items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name] + 0, tensor), name
        assert sum(read) < 20 << 20 if attempt == 0 else not read
        state["large"][0, 0] = 99  # stays in memory
        read.clear()
    assert len(list((tmp_path / "cache/shardckpt").glob("*/*"))) == 3
    damaged = MemoryStorage()
    shardckpt.save(saved, "memory://bucket/a", storage=damaged)
    objects, _ = damaged.at("memory://bucket/a")
    (key,) = [found.key for found in objects.list("a/") if found.key.endswith(".safetensors")]
    data, found = objects._objects[key]
    objects._objects[key] = data[:5_000_000] + b"?" + data[5_000_001:], found
    state = shardckpt.load_state("memory://bucket/a", device_map="disk", storage=damaged)
    for _ in range(2):
        with pytest.raises(errors.CorruptionError):
            _ = state["large"] + 0
    assert len(list((tmp_path / "cache/shardckpt").glob("*/*"))) == 3
