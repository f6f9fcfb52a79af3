"""Commands shared by several processes: this one, and others that it starts."""

from __future__ import annotations

import os

import pytest
import torch

import shardckpt
from shardckpt.cli.main import main

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]


@pytest.fixture
def state(tmp_path):
    found = {"a": torch.arange(3_000_000.0), "b": torch.arange(7), "step": 3}
    shardckpt.save(found, tmp_path / "c")
    return found


def same(state, path) -> bool:
    back = shardckpt.load_state(path)
    tensors = torch.equal(back["a"], state["a"]) and torch.equal(back["b"], state["b"])
    return tensors and back["step"] == state["step"]


def test_processes_share_the_work(tmp_path, state, capsys):
    source, target = str(tmp_path / "c"), tmp_path / "d"
    assert main(["reshard", source, str(target), "--shards", "3", "--jobs", "2"]) == 0
    assert capsys.readouterr().out.count("3 shards") == 1
    assert same(state, target)
    (target / "shard-00001-of-00003.safetensors").unlink()
    assert main(["verify", str(target), "--jobs", "2"]) == 6
    told = capsys.readouterr()
    assert "shard-00001-of-00003.safetensors" in told.err
    assert told.out.splitlines() == ["corrupted a", "intact    b"]


@pytest.mark.long
def test_processes_share_a_conversion(tmp_path, state):
    source, target = str(tmp_path / "c"), tmp_path / "d"
    assert main(["convert", source, str(target), "--format", "dcp", "--jobs", "2"]) == 0
    assert {".metadata", "__0_0.distcp", "__1_0.distcp"} == set(os.listdir(target))
    assert main(["convert", str(target), str(tmp_path / "e")]) == 0
    assert same(state, tmp_path / "e")


def test_jobs_is_a_number():
    with pytest.raises(SystemExit) as left:
        main(["verify", "x", "--jobs", "0"])
    assert left.value.code == 2
