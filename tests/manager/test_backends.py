"""The default backend of a manager saves, checks, loads and removes checkpoints of shards."""

from __future__ import annotations

import inspect

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.manager.backends import RECORD, CheckpointBackend, ShardedBackend
from shardckpt.storage.local_reader import LocalFiles
from shardckpt.storage.memory import MemoryStorage

STATE = {"w": torch.arange(600_000.0), RECORD: {"step": 3, "label": ""}}
OPTIONS = {"overwrite": False, "process_group": None, "base": None}


@pytest.fixture
def path(tmp_path):
    shardckpt.save(STATE, tmp_path / "c")
    return tmp_path / "c"


def shard(path):
    (found,) = path.glob("*.safetensors")
    return found


def flip(path) -> None:
    data = bytearray(shard(path).read_bytes())
    data[-1] ^= 1
    shard(path).write_bytes(data)


def test_the_default_backend_has_the_methods_of_the_interface():
    for name, method in inspect.getmembers(CheckpointBackend, inspect.isfunction):
        if not name.startswith("_"):
            own = inspect.signature(getattr(ShardedBackend, name)).parameters
            named = set(inspect.signature(method).parameters)
            assert "options" in own or named <= set(own), name


def test_the_record_is_read_without_reading_the_tensors(path, monkeypatch):
    read = []
    monkeypatch.setattr(LocalFiles, "readinto", lambda self, name, *a, **k: read.append(name))
    assert ShardedBackend().record(str(path)) == STATE[RECORD]
    assert read == []


def test_a_checkpoint_without_a_record_has_none(tmp_path):
    for number, state in enumerate(({"w": torch.ones(2)}, {RECORD: {"label": "x"}}, {RECORD: 1})):
        shardckpt.save(state, tmp_path / str(number))
        assert ShardedBackend().record(str(tmp_path / str(number))) is None


def test_the_record_of_a_checkpoint_with_a_truncated_shard_is_not_given(path):
    shard(path).write_bytes(shard(path).read_bytes()[:-1])
    with pytest.raises(errors.CorruptionError) as raised:
        ShardedBackend().record(str(path))
    assert raised.value.path == str(shard(path))


def test_a_quick_check_reads_sizes_and_a_full_one_every_block(path):
    reached = []
    backend = ShardedBackend()
    backend.verify(str(path), quick=False, progress=reached.append)
    assert reached[-1] == shard(path).stat().st_size
    flip(path)
    backend.verify(str(path), quick=True, progress=reached.append)
    with pytest.raises(errors.CorruptionError, match="block 2"):
        backend.verify(str(path), quick=False, progress=reached.append)
    shard(path).write_bytes(shard(path).read_bytes()[:-1])
    with pytest.raises(errors.CorruptionError):
        backend.verify(str(path), quick=True, progress=reached.append)


def test_shards_of_other_machines_are_checked_by_their_size_alone(path, monkeypatch):
    flip(path)
    monkeypatch.setattr(LocalFiles, "elsewhere", lambda self, name: True)
    ShardedBackend().verify(str(path), quick=False, progress=lambda size_bytes: None)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_calls_go_to_the_storage_of_the_backend(asynchronous):
    storage = MemoryStorage()
    backend = ShardedBackend(storage)
    path, folder = "memory://run/step-1", "memory://run"
    assert not backend.exists(path)
    handle = backend.save(STATE, path, asynchronous=asynchronous, **OPTIONS)
    assert (handle is not None) is asynchronous
    if handle is not None:
        handle.result(60)
    assert (backend.names(folder), backend.exists(path)) == (["step-1"], True)
    version = backend.version(path)
    state = {"w": torch.zeros(600_000), RECORD: {"step": 0, "label": "?"}}
    report = backend.load(state, path, strict=True, process_group=None)
    assert torch.equal(state["w"], STATE["w"])
    assert (report.path, state[RECORD]["step"]) == (path, 3)
    backend.save(STATE, path, asynchronous=False, **{**OPTIONS, "overwrite": True})
    assert backend.version(path) != version
    backend.remove(path)
    backend.sweep(folder)
    assert (backend.names(folder), backend.exists(path)) == ([], False)
