"""The commands verify, rescue and reshard."""

from __future__ import annotations

import torch

import shardckpt
from shardckpt import PerRank
from shardckpt.cli.main import main


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
