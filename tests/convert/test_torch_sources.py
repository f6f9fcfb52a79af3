"""Torch files of other programs as sources, and files that are refused."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from shardckpt import errors
from shardckpt.convert.convert import convert
from shardckpt.convert.torch_objects import ObjectsLoader
from shardckpt.convert.torch_sources import Index, open_torch_file, open_torch_folder, read_objects
from tests.convert import layouts
from tests.convert.layouts import Call, loaded
from tests.nn_handler.models import Net


def test_random_numbers_and_optimizer_of_a_trainer_by_themselves(tmp_path):
    layouts.trainer_folder(tmp_path / "t", Net(width=5))
    want = torch.load(tmp_path / "t" / "rng_state.pth", weights_only=False)
    report, state = loaded(tmp_path / "t" / "rng_state.pth")
    assert not report.left_out
    assert state["python"] == want["python"]
    name, keys, *rest = state["numpy"]
    assert (name, rest) == (want["numpy"][0], list(want["numpy"][2:]))
    assert keys.dtype == np.uint32
    assert np.array_equal(keys, want["numpy"][1])
    report, state = loaded(tmp_path / "t" / "optimizer.pt")
    assert state["param_groups"][0]["betas"] == (0.9, 0.999)


def test_indexed_torch_files_that_lack_a_tensor(tmp_path):
    layouts.bin_folder(tmp_path / "c", Net(width=5), files=2)
    torch.save({}, tmp_path / "c" / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(errors.CorruptionError, match="does not match"):
        convert(str(tmp_path / "c"), str(tmp_path / "d"))


def scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(path)


class Exits:
    def __reduce__(self):
        return os.mkdir, ("/nowhere",)


REFUSED = {
    "module": (lambda path: torch.save(nn.Linear(2, 2), path), "torch.nn.modules.linear.Linear"),
    "arguments": (lambda path: torch.save(argparse.Namespace, path), "argparse.Namespace"),
    "tensor": (lambda path: torch.save(torch.ones(2), path), "Tensor"),
    "script": (scripted, "TorchScript"),
    "protocol": (lambda path: torch.save({"n": 1}, path, pickle_protocol=4), "protocol"),
    "text": (lambda path: path.write_text("{}"), "begin"),
    "method": (lambda path: torch.save(Call(Path.touch, Path("x")), path), "bound method"),
    "system": (lambda path: torch.save({"x": Exits()}, path), "mkdir"),
    "cut": (lambda path: path.write_bytes(b"PK\3\4" + bytes(99)), "x.pt"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_refused_say_what_they_are(tmp_path, kind):
    write, text = REFUSED[kind]
    path = tmp_path / ("x.pt" if kind != "text" else "x.model")
    write(path)
    with pytest.raises(errors.CheckpointError) as caught:
        convert(str(path), str(tmp_path / "c"))
    expected = errors.CorruptionError if kind in ("system", "cut") else errors.NotACheckpointError
    assert type(caught.value) is expected
    assert text in str(caught.value)
    assert caught.value.remedy
    assert "\x1b" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_of_torch_before_1_6_that_holds_a_module_is_refused(tmp_path):
    state = {"net": nn.Linear(1, 1), "step": 1}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(errors.NotACheckpointError, match=r"modules\.linear\.Linear"):
        convert(tmp_path / "a.pt", tmp_path / "b")


def test_a_file_without_a_known_suffix_must_begin_like_a_torch_file(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "weights")
    with open_torch_file(str(tmp_path / "weights"), check=True) as source:
        assert source.manifest.tensors.keys() == {"w"}
    (tmp_path / "__0_0.distcp").write_bytes((tmp_path / "weights").read_bytes())
    (tmp_path / "notes").write_text("hello")
    found = {
        "__0_0.distcp": ("a part of a DCP checkpoint", f"convert the folder {tmp_path}"),
        "notes": ("a file that begins b'hell'", "check the path"),
    }
    for name, (actual, remedy) in found.items():
        with pytest.raises(errors.NotACheckpointError, match="not a torch file") as raised:
            open_torch_file(str(tmp_path / name), check=True)
        assert (raised.value.actual, raised.value.remedy) == (actual, remedy)


def test_checksums_are_verified_only_when_asked(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.full((1000,), 3.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((9,), 3.0).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(data)
    open_torch_file(str(path), check=False).close()
    with pytest.raises(errors.CorruptionError):
        open_torch_file(str(path), check=True)


@pytest.mark.parametrize(("state", "actual"), [([1, 2], "list"), (torch.ones(1), "Tensor")])
def test_a_file_that_holds_no_dict_is_refused(tmp_path, state, actual):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(errors.NotACheckpointError, match="does not hold a dict") as raised:
        read_objects(str(tmp_path / "x.pt"), ObjectsLoader())
    assert raised.value.actual == actual


def test_the_files_of_a_folder_are_read_as_the_index_says(tmp_path):
    folder = tmp_path / "c"
    model = Net(width=5)
    layouts.bin_folder(folder, model, files=3)
    (folder / "other.txt").touch()
    with open_torch_folder(str(folder), "pytorch_model.bin.index.json", check=True) as source:
        names = source.manifest.tensors.keys()
        assert names == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            full = source.read_box(name, (0,) * tensor.dim(), tuple(tensor.shape))
            assert torch.equal(full, tensor)
        assert source.origin.format == "Hugging Face's layout, torch files"
        assert "other.txt" in source.origin.left_out
        assert source.origin.companions == ("config.json",)
        assert len(source.origin.files) == 4


def test_an_index_is_read_as_names_of_tensors_and_their_files():
    index = msgspec.json.decode(b'{"metadata": {}, "weight_map": {"w": "f"}}', type=Index)
    assert index.weight_map == {"w": "f"}
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"weight_map": {"w": 3}}', type=Index)
