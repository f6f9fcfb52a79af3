"""A checkpoint of any format is opened as a source, with selected, renamed and changed entries."""

from __future__ import annotations

import os

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.checkpoint import Checkpoint
from shardckpt.convert.opening import open_source
from shardckpt.state.saved_tree import SavedState
from shardckpt.transforms import Rename

STATE = {"model": {"a": torch.ones(2), "b": torch.zeros(2)}, "step": 7}


@pytest.fixture(params=["shards", "x.pt", "x.safetensors"])
def path(request, tmp_path):
    shardckpt.save(STATE, tmp_path / "shards")
    if request.param != "shards":
        shardckpt.convert(tmp_path / "shards", tmp_path / request.param)
    return tmp_path / request.param


def test_every_format_is_opened(path):
    with open_source(path) as source:
        assert SavedState(source.manifest).leaves.keys() == {"model.a", "model.b", "step"}


def test_transforms_come_before_keys_and_keys_before_rename(path):
    with open_source(
        path,
        transforms=[Rename("model.a", "model.c")],
        keys=["model.c"],
        rename={"model": "net"},
        dtype="bfloat16",
    ) as source:
        (leaf,) = SavedState(source.manifest).leaves.items()
        assert leaf[0] == "net.c"
        assert source.read_box(leaf[1].name, (1,), (1,)).dtype == torch.bfloat16


def test_a_source_is_closed_after_an_error(tmp_path, monkeypatch):
    shardckpt.save(STATE, tmp_path / "shards")
    closed = []
    monkeypatch.setattr(Checkpoint, "close", lambda self: closed.append(self.path))
    with pytest.raises(errors.LoadMismatchError):
        open_source(tmp_path / "shards", keys=["nothing"])
    assert closed == [str(tmp_path / "shards")]


def test_an_error_about_the_names_in_a_file_has_its_path(tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"a.b": torch.ones(2), "a": {"b": torch.ones(3)}}, file)
    with pytest.raises(errors.StateError) as raised:
        open_source(file)
    assert raised.value.path == str(file)
    assert raised.value.tensor == "a.b"


@pytest.mark.parametrize("name", ["empty", "notes", "pipe"])
def test_a_path_without_a_checkpoint_is_an_error_that_does_not_refer_to_convert(tmp_path, name):
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    if name == "notes":
        (path / "readme.txt").write_text("nothing")
    with pytest.raises(errors.NotACheckpointError) as raised:
        open_source(path)
    assert raised.value.path == str(path)
    assert raised.value.remedy
    assert "convert" not in raised.value.remedy
