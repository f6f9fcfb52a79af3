"""Lazy tensors and states of an open checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import errors


def a_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def test_a_slice_reads_only_its_blocks(tmp_path):
    tensor = torch.arange(4 << 20, dtype=torch.float32).reshape(-1, 1024)
    shardckpt.save({"t": tensor}, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        handle = checkpoint["t"]
        assert (handle.shape, handle.dtype) == (tensor.shape, torch.float32)
        read = []
        files, readinto = checkpoint.files, type(checkpoint.files).readinto

        def counted(self, name, buffers, *, offset, on_filled=None, wait=True):
            readinto(self, name, buffers, offset=offset, on_filled=on_filled, wait=wait)
            read.append(sum(map(len, buffers)))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(files), "readinto", counted)
            assert torch.equal(handle[8:16], tensor[8:16])
            assert sum(read) == 1 << 20
        for index in (5, slice(None), (..., 3), (slice(2, 9), slice(100, 200)), -1, (7, -2)):
            assert torch.equal(handle[index], tensor[index])
        others = (None, True, (..., ...), [1], torch.tensor([1, 2]), np.arange(3))
        for index in (slice(None, None, 2), 10**6, -4097, (0, 0, 0), *others):
            with pytest.raises(IndexError):
                handle[index]
        with pytest.raises(ValueError, match="step"):
            handle[::-1]
        with pytest.raises(KeyError):
            checkpoint["nothing"]


def test_a_slice_parses_no_more_of_the_manifest_than_it_needs(tmp_path, monkeypatch):
    state = {"m": {"layer.0": {"w": torch.arange(6.0).reshape(3, 2)}}, "n": 5}
    shardckpt.save(state, tmp_path / "c")

    def complete(data, *, path):
        raise AssertionError("all of it")

    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        monkeypatch.setattr("shardckpt.storage.opened.from_bytes", complete)
        tensor = checkpoint["m.layer.0.w"]
        assert tensor[1].tolist() == [2, 3]
        assert (tensor.size_bytes, tensor.shards) == (24, {0})
        with pytest.raises(AssertionError, match="all of it"):
            checkpoint["n"]
        monkeypatch.undo()
        assert checkpoint["n"] == 5
        assert set(checkpoint) == {"m.layer.0.w", "n"}
        assert checkpoint["m.layer.0.w"][1].tolist() == tensor[1].tolist() == [2, 3]


def test_a_slice_of_a_corrupted_block_names_all_corrupted_tensors(tmp_path):
    shardckpt.save({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        for name in ("a", "b", "a"):
            with pytest.raises(errors.CorruptionError) as caught:
                checkpoint[name][0:1]
            assert set(caught.value.tensor.split(", ")) == {"a", "b"}


def test_a_device_map_places_the_tensors_of_a_state(tmp_path):
    model = a_model()
    shardckpt.save({"m": model, "s": 1}, tmp_path / "c")
    for device_map in ("cpu", None, "auto", "balanced", "disk", {"": "cpu", "m.2": "meta"}):
        state = shardckpt.load_state(tmp_path / "c", device_map=device_map)
        assert torch.equal(state["m"]["0.weight"], model[0].weight)
        assert state["m"]["2.weight"].is_meta == isinstance(device_map, dict)
    assert shardckpt.load_state(tmp_path / "c", device_map="meta")["m"]["0.weight"].is_meta
    with pytest.raises(errors.StateError):
        shardckpt.load_state(tmp_path / "c", device_map={"m.0": "cpu"})
    with pytest.raises(errors.StateError):
        shardckpt.load_state(tmp_path / "c", device_map="nowhere")


def test_a_closed_checkpoint_and_an_open_one_describe_the_same_entries(tmp_path):
    state = {"w": torch.ones(2, 3), "tied": None, "n": 5, "r": shardckpt.PerRank(7)}
    state["tied"] = state["w"]
    report = shardckpt.save(state, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        assert set(checkpoint) == {"w", "tied", "n", "r"}
        assert len(checkpoint) == 4
        assert (checkpoint["n"], checkpoint["r"]) == (5, [7])
        assert set(checkpoint.tensors()) == {"w", "tied"}
        metadata = checkpoint.metadata()
    assert metadata == shardckpt.metadata(tmp_path / "c")
    assert metadata.checkpoint_id == report.checkpoint_id
    assert metadata.tensors["w"].shape == (2, 3)
    assert set(metadata.values) == {"n", "r"}
    assert metadata.total_bytes == report.total_bytes
