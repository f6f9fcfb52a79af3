"""Every format that convert lists is written and offered on the command line."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt.cli.main import main
from shardckpt.convert.convert import convert
from shardckpt.convert.formats import FORMATS
from shardckpt.convert.opening import open_source


@pytest.mark.filterwarnings("ignore")  # DCP's, of one process
@pytest.mark.parametrize("to", FORMATS)
def test_each_format_is_written_and_read(tmp_path, to):
    shardckpt.save({"w": torch.arange(3.0)}, tmp_path / "c")
    name = {"torch": "x.pt", "safetensors": "x.safetensors", "lightning": "x.ckpt"}.get(to, "x")
    report = convert(tmp_path / "c", tmp_path / name, to=to)
    assert report.target_format == to
    with open_source(tmp_path / name) as source:
        (entry,) = source.manifest.tensors.values()
        assert (entry.dtype, entry.shape) == ("F32", (3,))


def test_the_command_offers_each_format_and_names_them_for_another_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path), str(tmp_path / "x"), "--format", "onnx"])
    error = capsys.readouterr().err
    assert all(f"'{name}'" in error for name in FORMATS)


def test_the_names_of_formats():
    assert FORMATS == ("shardckpt", "dcp", "hf", "lightning", "safetensors", "torch")
