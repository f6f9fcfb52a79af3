"""Torch files of other programs as sources, and files that are refused."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shardckpt import errors
from shardckpt.convert.convert import convert
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
