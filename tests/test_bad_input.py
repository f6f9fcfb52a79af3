"""Bad input raises a typed error that names path, tensor, expected and actual value."""

from __future__ import annotations

import os
import pickle

import msgspec
import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import errors


@pytest.fixture
def checkpoint(tmp_path):
    state = {"model": {"w": torch.arange(600_000, dtype=torch.float32), "b": torch.ones(7)}}
    shardckpt.save({**state, "step": 3}, tmp_path / "c")
    return tmp_path / "c"


def shard_of(checkpoint):
    return checkpoint / "shard-00000-of-00001.safetensors"


def refused(kind, call, *needed):
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert isinstance(error, errors.ShardckptError)
    assert isinstance(error, Exception)
    for fact in ("remedy", *needed):
        assert getattr(error, fact) is not None, f"{fact} is missing in:\n{error}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


def test_a_path_without_anything_is_an_error(tmp_path):
    error = refused(
        errors.CheckpointNotFoundError,
        lambda: shardckpt.load_state(tmp_path / "no"),
        "path",
        "expected",
        "actual",
    )
    assert isinstance(error, FileNotFoundError)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"")
    error = refused(
        errors.NotACheckpointError, lambda: shardckpt.load_state(tmp_path), "path", "actual"
    )
    assert "torch.distributed.checkpoint" in error.actual


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "f").write_text("x")
    refused(errors.NotACheckpointError, lambda: shardckpt.load_state(tmp_path / "f"), "path")
    refused(errors.CheckpointExistsError, lambda: shardckpt.save({}, tmp_path / "f"), "path")
    refused(errors.NotACheckpointError, lambda: shardckpt.save({}, tmp_path / "f", overwrite=True))
    refused(errors.StorageError, lambda: shardckpt.save({}, tmp_path / "f" / "below"), "path")
    assert (tmp_path / "f").read_text() == "x"


def test_a_newer_format(checkpoint):
    manifest = checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"version":1', b'"version":2', 1))
    refused(errors.FormatVersionError, lambda: shardckpt.load_state(checkpoint), "path", "expected")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"not json", b'{"format":"other"}', b"\xff"])
def test_a_manifest_that_is_none(checkpoint, text):
    (checkpoint / "manifest.json").write_bytes(text)
    refused(errors.NotACheckpointError, lambda: shardckpt.load_state(checkpoint), "path")


def test_a_missing_shard(checkpoint):
    shard_of(checkpoint).unlink()
    error = refused(errors.CorruptionError, lambda: shardckpt.load_state(checkpoint), "path")
    assert error.path.endswith(".safetensors")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_cut_or_grown(checkpoint, change):
    size = shard_of(checkpoint).stat().st_size
    os.truncate(shard_of(checkpoint), size + change)
    error = refused(errors.CorruptionError, lambda: shardckpt.load_state(checkpoint), "path")
    assert str(size) in error.expected


def test_a_changed_byte_names_the_tensor(checkpoint):
    shard = shard_of(checkpoint)
    data = bytearray(shard.read_bytes())
    data[2_000_000] ^= 1
    shard.write_bytes(data)
    error = refused(
        errors.CorruptionError, lambda: shardckpt.load_state(checkpoint), "path", "tensor"
    )
    assert error.tensor == "model.w"
    with shardckpt.open_checkpoint(checkpoint) as opened:
        assert opened["model.w"][:10].tolist() == list(range(10))  # in a block that is whole
        error = refused(errors.CorruptionError, opened.verify, "tensor")
        assert error.tensor == "model.w"


def test_a_changed_byte_in_the_manifest(checkpoint):
    manifest = checkpoint / "manifest.json"
    data = manifest.read_bytes()
    at = data.index(b'"step":3')
    manifest.write_bytes(data[: at + 7] + b"4" + data[at + 8 :])
    refused(errors.CorruptionError, lambda: shardckpt.load_state(checkpoint), "path", "expected")


def test_a_shard_of_another_checkpoint(checkpoint, tmp_path):
    shardckpt.save(
        {"model": {"w": torch.ones(600_000), "b": torch.ones(7)}, "step": 3}, tmp_path / "d"
    )
    os.replace(shard_of(tmp_path / "d"), shard_of(checkpoint))
    refused(errors.CorruptionError, lambda: shardckpt.load_state(checkpoint), "path")


def test_links_and_pipes_are_not_followed(checkpoint, tmp_path):
    shard = shard_of(checkpoint)
    os.rename(shard, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", shard)
    refused(errors.CorruptionError, lambda: shardckpt.load_state(checkpoint), "path")
    shard.unlink()
    os.mkfifo(shard)
    refused(errors.CorruptionError, lambda: shardckpt.load_state(checkpoint), "path")


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({"a": {"b": [1, object()]}}, "a.b.1"),
        ({"f": lambda: 1}, "f"),
        ({"x": {"y": torch.nn.Linear}}, "x.y"),
        ({"s": torch.eye(3).to_sparse()}, "s"),
        ({"m": torch.empty(2, device="meta")}, "m"),
    ],
)
def test_unsupported_leaves_are_named(tmp_path, state, name):
    error = refused(
        errors.UnsupportedLeafError, lambda: shardckpt.save(state, tmp_path / "c"), "actual"
    )
    assert error.tensor == name
    assert isinstance(error, TypeError)
    assert os.listdir(tmp_path) == []


def test_a_state_that_contains_itself(tmp_path):
    state: dict = {"a": {}}
    state["a"]["a"] = state
    refused(errors.UnsupportedLeafError, lambda: shardckpt.save(state, tmp_path / "c"), "tensor")


def test_two_entries_of_one_name(tmp_path):
    state = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}
    refused(errors.StateError, lambda: shardckpt.save(state, tmp_path / "c"), "tensor")


def test_an_optimizer_without_its_module(tmp_path):
    model = nn.Linear(2, 2)
    state = {"o": torch.optim.SGD(model.parameters())}
    error = refused(
        errors.OptimizerModuleError, lambda: shardckpt.save(state, tmp_path / "c"), "tensor"
    )
    assert error.tensor == "o"


@pytest.mark.parametrize("path", ["", "a\0b", b"bytes"])
def test_an_invalid_path_is_an_error(path):
    refused(errors.StateError, lambda: shardckpt.save({}, path))


def test_a_bare_tensor_has_no_name(tmp_path):
    refused(errors.StateError, lambda: shardckpt.save(torch.ones(2), tmp_path / "c"))


def test_a_lack_of_permission_is_an_error(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    refused(errors.StoragePermissionError, lambda: shardckpt.save({}, tmp_path / "c"), "path")


def test_an_enum_whose_module_is_not_imported(tmp_path):
    manifest = tmp_path / "c" / "manifest.json"
    shardckpt.save({"e": 1}, tmp_path / "c")
    from shardckpt.format import manifest as format_manifest

    found = format_manifest.from_bytes(manifest.read_bytes(), path="")
    found.state["e"] = {"$enum": ["antigravity", "Gravity", "UP"]}
    manifest.write_bytes(format_manifest.to_bytes(found))
    error = refused(errors.CheckpointError, lambda: shardckpt.load_state(tmp_path / "c"))
    assert "import antigravity" in error.remedy
    assert msgspec.json.decode(manifest.read_bytes())["id"]
