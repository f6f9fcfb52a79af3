"""A full state as one file, or as one file for each component."""

from __future__ import annotations

import argparse
import os

import pytest
import torch

from shardckpt import NNHandler, errors
from shardckpt.convert.convert import convert
from shardckpt.convert.opening import open_source
from shardckpt.convert.single_files import DIGEST, TREE, read_one, write_one
from shardckpt.errors import CorruptionError
from tests.convert.states import same


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("key", [TREE, DIGEST, "__metadata__"])
def test_no_flipped_bit_makes_our_file_foreign(tmp_path, key, check):
    path = tmp_path / "x.safetensors"
    write_one({"a": torch.ones(2), "n": 1}, str(path), overwrite=False)
    data = path.read_bytes()
    begin = data.index(f'"{key}"'.encode()) + 1
    for bit in range(8 * len(key)):
        changed = bytearray(data)
        changed[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CorruptionError):
            read_one(str(path), check=check)
        if bit % 8 == 0:  # they share what tells
            with pytest.raises(CorruptionError):
                open_source(str(path), check=check)


def test_a_link_that_a_user_makes_to_a_file_is_followed(tmp_path):
    for name in ("x.pth", "x.safetensors"):
        write_one({"a": torch.ones(2)}, str(tmp_path / f"real-{name}"), overwrite=False)
        (tmp_path / name).symlink_to(f"real-{name}")
        assert same(read_one(str(tmp_path / name)), {"a": torch.ones(2)})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt", ""])
def test_file_names_that_are_not_utf8(tmp_path, suffix):
    """Every reader can read a file that was saved under such a name."""
    path = str(tmp_path) + os.sep + os.fsdecode(b"w\xff") + suffix
    write_one({"a": torch.arange(3.0), "n": 1}, str(tmp_path / "x.pth"), overwrite=False)
    convert(tmp_path / "x.pth", path)
    convert(path, tmp_path / "back.pth")
    assert same(read_one(str(tmp_path / "back.pth")), {"a": torch.arange(3.0), "n": 1})


def test_a_strict_reader_names_the_class(tmp_path):
    torch.save({"args": argparse.Namespace()}, tmp_path / "x.pth")
    for read in (NNHandler.load, read_one):
        with pytest.raises(errors.NotACheckpointError, match=r"argparse\.Namespace") as caught:
            read(str(tmp_path / "x.pth"))
        assert "\x1b" not in str(caught.value)
        assert "shardckpt convert" in caught.value.remedy
