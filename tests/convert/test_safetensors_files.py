"""safetensors files and folders in the layout of Hugging Face are written and read."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main
from shardckpt.convert.convert import convert
from tests.convert import layouts
from tests.convert.layouts import loaded, same_weights
from tests.convert.states import model, plain
from tests.nn_handler.models import Net


def test_the_model_as_hugging_face_has_it(tmp_path, saved):
    names = ["--keys", "model", "--rename", "model=", "--max-file-size", "1MB"]
    assert main(["convert", saved, str(tmp_path / "hf"), "--format", "hf", *names]) == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    found = {name: load_file(tmp_path / "hf" / name) for name in files}
    want = model()
    tied = want.pop("tied")
    assert plain({k: v for own in found.values() for k, v in own.items()}) == plain(want)
    assert index["weight_map"] == {k: name for name, own in found.items() for k in own}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    with safe_open(tmp_path / "hf" / index["weight_map"]["layers.0.weight"], "pt") as file:
        assert file.metadata() == {"format": "pt", "tied": "layers.0.weight"}
    convert(str(tmp_path / "hf"), str(tmp_path / "back"), rename={"": "model"})
    back = {"model": {name: torch.zeros_like(tensor) for name, tensor in model().items()}}
    shardckpt.load(back, tmp_path / "back")
    assert plain(back["model"]) == plain({**want, "tied": tied})


def test_files_beside_the_weights_are_copied_to_hugging_faces_layout(tmp_path):
    model, folder = Net(width=5), tmp_path / "c"
    layouts.trainer_folder(folder, model)
    (tmp_path / "secret.json").write_text("secret")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    companions = {"config.json", "generation_config.json", "tokenizer.json"}
    for overwrite in (False, True):
        report = convert(str(folder), str(tmp_path / "hf"), to="hf", overwrite=overwrite)
        assert set(report.copied) == companions
        assert "special_tokens_map.json" in report.left_out
        assert not companions & report.left_out.keys()
        assert json.loads((tmp_path / "hf" / "config.json").read_text()) == layouts.CONFIG
        weights = {n for n in os.listdir(tmp_path / "hf") if n not in companions}
        assert all(name.startswith("model") for name in weights)
    (tmp_path / "hf" / "tokenizer.json").write_text("mine")
    with pytest.raises(errors.NotACheckpointError, match=r"tokenizer\.json"):
        convert(str(folder), str(tmp_path / "hf"), to="hf", overwrite=True)


def test_an_adapter_and_other_weights(tmp_path):
    layouts.trainer_folder(tmp_path / "c", Net(width=5))
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "adapter_model.safetensors")
    (tmp_path / "c" / "adapter_config.json").write_text("{}")
    report, state = loaded(tmp_path / "c")
    assert same_weights(state, Net(width=5)) or len(state) == len(report.tensors)
    report = convert(str(tmp_path / "c"), str(tmp_path / "hf"), to="hf")
    assert "adapter_config.json" in report.copied
    assert set(load_file(tmp_path / "hf" / "model.safetensors")) == set(state)
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()
