"""Checkpoints of a handler are opened in every format, and other paths are refused."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.nn_handler.handler_source import open_handler
from shardckpt.storage.local import LocalStorage


def linear() -> NNHandler:
    return NNHandler(nn.Linear, device="cpu", in_features=3, out_features=2)


@pytest.mark.parametrize("form", ["shards", "one.pth", "one.safetensors", "many"])
def test_every_format_gives_the_same_values_and_tensors(tmp_path, form):
    handler, path = linear(), str(tmp_path / form)
    handler.epoch = 3
    handler.save_multi_files(path) if form == "many" else handler.save(path)
    source = open_handler(path)
    saved = source.values()
    assert (source.path, saved.progress.epoch) == (path, 3)
    assert saved.config.model.class_name == {"shardckpt.import": "torch.nn.modules.linear:Linear"}
    assert saved.config.model.kwargs == {"in_features": 3, "out_features": 2}
    assert source.shapes["model.weight"] == torch.Size([2, 3])
    assert source.dtypes["model.bias"] == torch.float32
    if form == "shards":
        assert isinstance(source.storage, LocalStorage)
        assert source.ranks is None
    else:
        assert [set(own) for own in source.ranks] == [{"random", "sums", "epoch_random"}]


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    shardckpt.save({"config": {"width": 2}, "w": torch.ones(2)}, tmp_path / "c")
    source = open_handler(str(tmp_path / "c"))
    with pytest.raises(errors.NotACheckpointError, match="not saved by an NNHandler") as caught:
        source.values()
    assert caught.value.expected == "the entry config.model"
    assert "initialize_from_checkpoint" in caught.value.remedy
    assert source.shapes == {"w": torch.Size([2])}


def test_a_file_without_a_dict_is_refused(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "c.pth")
    with pytest.raises(errors.NotACheckpointError, match="does not hold a dict") as caught:
        open_handler(str(tmp_path / "c.pth"))
    assert caught.value.actual == "list"


def test_a_folder_of_checkpoints_names_the_newest(tmp_path):
    for number, name in enumerate(("b", "a.pth", "many")):
        if name == "many":
            linear().save_multi_files(tmp_path / name)
        else:
            linear().save(tmp_path / name)
        os.utime(tmp_path / name, (number, 10 - number))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(errors.NotACheckpointError, match="contains checkpoints") as caught:
        open_handler(str(tmp_path))
    assert caught.value.actual == "a.pth, b, many"
    assert caught.value.remedy.endswith(str(tmp_path / "b"))


def test_a_path_that_is_not_there(tmp_path):
    for name in ("shards", "one.pth"):
        with pytest.raises(errors.CheckpointNotFoundError, match=name):
            open_handler(str(tmp_path / name)).values()
