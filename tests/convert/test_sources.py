"""Checkpoints of others as sources, the selection of their entries, and their origin."""

from __future__ import annotations

import numpy as np
import torch

import shardckpt
from shardckpt.convert.convert import convert
from shardckpt.convert.single_files import read_one
from tests.convert.layouts import loaded


def test_what_ranks_had_of_their_own(tmp_path):
    own = shardckpt.PerRank({"seed": 5, "state": torch.arange(3), "array": np.arange(2)})
    shardckpt.save({"w": torch.ones(2), "rng": own, "other": own}, tmp_path / "c")
    convert(str(tmp_path / "c"), str(tmp_path / "d"), keys=["rng", "w"], rename={"w": "v"})
    with shardckpt.open_checkpoint(tmp_path / "d") as checkpoint:
        assert set(checkpoint) == {"v", "rng"}
        assert set(checkpoint.manifest.tensors) == {"v", "rng.state@rank0", "rng.array@rank0"}
    back = {"v": torch.zeros(2), "rng": shardckpt.PerRank({"seed": 0, "state": 0, "array": 0})}
    shardckpt.load(back, tmp_path / "d")
    assert back["rng"].value["state"].tolist() == [0, 1, 2]
    convert(str(tmp_path / "c"), str(tmp_path / "x.safetensors"), keys="rng")
    (listed,) = read_one(str(tmp_path / "x.safetensors"))["rng"]
    assert (listed["seed"], listed["array"].tolist()) == (5, [0, 1])


def test_files_beside_shards_are_listed(tmp_path):
    shardckpt.save({"w": torch.ones(2)}, tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("{}")
    report, _ = loaded(tmp_path / "c")
    assert report.left_out.keys() == {"tokenizer.json"}
    assert report.source_format == "shardckpt"
