"""The commands verify, rescue and reshard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt import PerRank
from shardckpt.cli.main import main
from shardckpt.errors import CorruptionError


def test_reshard_writes_another_number_of_shards(tmp_path, capsys):
    state = {"t": torch.arange(1 << 20).reshape(-1, 8), "r": PerRank({"x": torch.ones(2)}), "n": 1}
    shardckpt.save(state, tmp_path / "c")
    target = str(tmp_path / "d")
    assert main(["reshard", str(tmp_path / "c"), target, "--shards", "3"]) == 0
    assert "3 shards" in capsys.readouterr().out
    sizes = [path.stat().st_size for path in (tmp_path / "d").glob("*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 8192
    found = shardckpt.load_state(target)
    assert torch.equal(found["t"], state["t"])
    assert found["r"][0]["x"].tolist() == [1, 1]
    again = {"r": PerRank({"x": torch.zeros(2)})}
    shardckpt.load(again, target)  # still a checkpoint of one rank
    assert again["r"].value["x"].tolist() == [1, 1]
    assert main(["verify", target]) == 0
    assert main(["reshard", str(tmp_path / "c"), target, "--shards", "1"]) == 7
    arguments = ["reshard", str(tmp_path / "c"), target, "--shards", "1", "--overwrite"]
    assert main(arguments) == 0
    assert main(["reshard", str(tmp_path / "c"), str(tmp_path / "e"), "--shards", "0"]) == 3


def test_verify_prints_json(saved, tmp_path, capsys):
    assert main(["verify", saved, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["corrupted"] == report["errors"] == []
    assert "model.0.weight" in report["intact"]
    (shard,) = Path(saved).glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["verify", saved, "--json"]) == CorruptionError.exit_code
    report = json.loads(capsys.readouterr().out)
    assert report["corrupted"]
    assert shard.name in report["errors"][0]
    assert main(["rescue", saved, str(tmp_path / "r"), "--json"]) == 0
    rescued = json.loads(capsys.readouterr().out)
    assert rescued["path"] == str(tmp_path / "r")
    assert len(rescued["saved"]) == 5
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    assert main(["verify", str(tmp_path / "w.pt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["readable"]) == ("a torch file", ["w"])


def test_every_tensor_of_another_library_is_read(lightning, capsys):
    assert main(["verify", str(lightning)]) == 0
    assert "a torch file, 1 tensor, 24 B: readable" in capsys.readouterr().out
    data = bytearray(lightning.read_bytes())
    at = data.index(torch.ones(6).numpy().tobytes())
    data[at] ^= 1
    lightning.write_bytes(data)
    assert main(["verify", str(lightning)]) == CorruptionError.exit_code


@pytest.mark.long
def test_processes_share_the_tensors_of_another_library(tmp_path, capfd):
    torch.save({f"w{i}": torch.ones(4) for i in range(5)}, tmp_path / "w.pt")
    assert main(["verify", str(tmp_path / "w.pt"), "--jobs", "2"]) == 0
    assert capfd.readouterr().out.count("5 tensors, 80 B: readable") == 1
