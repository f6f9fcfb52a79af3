"""A checkpoint is opened with its manifest, and the checkpoints of a folder one after another."""

from __future__ import annotations

import logging

import pytest
import torch

import shardckpt
from shardckpt.errors import CheckpointNotFoundError, CorruptionError, NotACheckpointError
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.local_reader import LocalFiles
from shardckpt.storage.opened import OpenedCheckpoint, checkpoints_in


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        shardckpt.save({"w": torch.ones(step)}, tmp_path / "run" / f"step-{step}")
    return tmp_path / "run"


@pytest.fixture
def closed(monkeypatch):
    """The paths whose files were closed, in order."""
    paths, close = [], LocalFiles.close
    monkeypatch.setattr(LocalFiles, "close", lambda self: (paths.append(self.path), close(self)))
    return paths


def change(path, old: bytes, new: bytes) -> None:
    manifest = path / "manifest.json"
    data = manifest.read_bytes()
    assert old in data
    manifest.write_bytes(data.replace(old, new, 1))


def test_the_manifest_is_parsed_at_its_first_use(folder, monkeypatch):
    parsed = []
    from shardckpt.storage import opened

    parse = opened.from_bytes
    monkeypatch.setattr(
        opened, "from_bytes", lambda text, path: parsed.append(path) or parse(text, path=path)
    )
    path = str(folder / "step-2")
    with OpenedCheckpoint(path, storage=LocalStorage()) as checkpoint:
        assert parsed == []
        assert checkpoint.manifest.tensors["w"].shape == (2,)
        assert checkpoint.manifest is checkpoint.manifest
        assert checkpoint.path == checkpoint.files.path == path
    assert parsed == [path]


def test_a_manifest_that_does_not_match_its_digest_is_refused_and_closed(folder, closed):
    change(folder / "step-1", b'"version":1', b'"version": 1')
    path = str(folder / "step-1")
    with pytest.raises(CorruptionError) as raised:
        OpenedCheckpoint(path, storage=LocalStorage())
    assert raised.value.path == path
    assert closed == [path]


def test_the_newest_checkpoint_is_asked_for_on_demand():
    class Places(Storage):
        def open(self, path):
            raise CheckpointNotFoundError("open", path=path)

        def open_newest(self, path):
            raise NotACheckpointError("open_newest", path=path)

    with pytest.raises(CheckpointNotFoundError):
        OpenedCheckpoint("c", storage=Places())
    with pytest.raises(NotACheckpointError):
        OpenedCheckpoint("c", storage=Places(), newest=True)


def test_the_checkpoints_of_a_folder_are_open_one_at_a_time(folder, closed):
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").touch()
    found = []
    for name, checkpoint in checkpoints_in(folder, OpenedCheckpoint):
        found.append((name, len(checkpoint.manifest.tensors)))
        assert str(folder / name) not in closed
    assert found == [("step-1", 1), ("step-2", 1)]
    assert [path for path in closed if "step" in path] == [
        str(folder / "step-1"),
        str(folder / "step-2"),
    ]


def test_a_checkpoint_that_can_not_be_read_is_left_out_with_a_warning(folder, caplog):
    change(folder / "step-1", b'"version":1', b'"version":9')
    with caplog.at_level(logging.WARNING, "shardckpt"):
        names = [name for name, _ in checkpoints_in(folder, OpenedCheckpoint)]
    assert names == ["step-2"]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{folder}/step-1 is left out: ")


def test_the_path_itself_may_be_the_checkpoint(folder):
    ((name, checkpoint),) = checkpoints_in(folder / "step-2", OpenedCheckpoint)
    assert (name, checkpoint.path) == ("step-2", str(folder / "step-2"))


def test_a_folder_without_a_checkpoint_is_an_error_about_both(tmp_path):
    with pytest.raises(CheckpointNotFoundError) as raised:
        list(checkpoints_in(tmp_path / "nothing", OpenedCheckpoint))
    assert raised.value.expected == "a checkpoint, or a folder of checkpoints"
    assert raised.value.remedy == "check the path"
    with pytest.raises(NotACheckpointError):
        list(checkpoints_in(tmp_path, OpenedCheckpoint))


def test_a_manifest_of_another_form_leaves_out_this_checkpoint_only(folder, closed):
    change(folder / "step-1", b'"world_size":1', b'"world_size":0')
    errors = {}
    found = checkpoints_in(folder, OpenedCheckpoint, on_error=errors.__setitem__)
    assert [name for name, _ in found] == ["step-2"]
    assert list(errors) == ["step-1"]
    assert str(folder / "step-1") in closed
