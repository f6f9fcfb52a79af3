"""The command inspect: a page for people, and JSON for programs."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import shardckpt
from shardckpt.cli.main import main
from tests.cli.states import Phase, save_some


def test_inspect_prints_tensors_values_and_shards(tmp_path, capsys):
    save_some(tmp_path / "c")
    assert main(["inspect", str(tmp_path / "c")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "c")
    assert "on 1 rank" in lines[1]
    assert "4 tensors" in lines[2]
    rows = [" ".join(line.split()) for line in lines]
    assert "model.w float32 [3, 4] 48 B shard 0" in rows
    assert "model.tied float32 [3, 4] 48 B tied to model.w" in rows
    assert "model 2 tensors 52 B" in rows  # tied ones count once
    assert "step 7" in rows
    assert "history.1 [0.5, nan]" in rows
    assert not [row for row in rows if row.startswith("history.1.")]
    assert "rng [{'seed': 3, 't': <tensor rng.t@rank0>}]" in rows
    assert max(map(len, lines)) <= 120
    assert any("WARM" in row for row in rows)


def test_inspect_as_json(tmp_path, capsys):
    save_some(tmp_path / "c")
    assert main(["inspect", str(tmp_path / "c"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"]["model.w"] == {
        "dtype": "float32",
        "shape": [3, 4],
        "size_bytes": 48,
        "shards": [0],
        "tied_to": None,
    }
    assert found["tensors"]["model.tied"]["tied_to"] == "model.w"
    assert found["values"]["step"] == 7
    assert found["world_size"] == 1
    assert found["shards"][0]["size_bytes"] > 4096


def test_inspect_and_lists_do_not_import_torch(tmp_path):
    save_some(tmp_path / "c")
    commands = [["inspect", "c"], ["inspect", "c", "--json"], ["ls", "."], ["du", "."], ["--help"]]
    code = f"""
import sys
from shardckpt.cli.main import main
from shardckpt.errors import CorruptionError
for command in {commands}:
    assert main(command) == 0
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "model.tied" in done.stdout
    assert done.stdout.endswith("\nFalse\n")


def test_inspect_shows_values_of_torch(tmp_path, capsys):
    values = {"dtype": torch.bfloat16, "size": torch.Size([2, 3]), "device": torch.device("cpu")}
    shardckpt.save({**values, "layout": torch.strided}, tmp_path / "c")
    assert main(["inspect", str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == {
        "dtype": {"$dtype": "bfloat16"},
        "size": {"$size": [2, 3]},
        "device": {"$device": "cpu"},
        "layout": {"$layout": "strided"},
    }


def test_inspect_of_thousands_of_tensors_is_a_page(tmp_path, capsys):
    layers = {
        f"{layer}.{part}.{kind}": torch.ones(2, 2) if kind == "weight" else torch.ones(2)
        for layer in range(300)
        for part in ("attention", "mlp")
        for kind in ("weight", "bias")
    }
    experts = {f"{layer}.e.{n}.w": torch.ones(1) for layer in (0, 2) for n in range(4)}
    state = {"layers": layers, "experts": experts, "embed": torch.ones(5, 2), "layers2": {}}
    layers["7.mlp.bias"] = torch.ones(3)  # one that is unlike the others
    shardckpt.save(state, tmp_path / "c")
    assert main(["inspect", str(tmp_path / "c")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert len(lines) < 30
    assert "layers.{0-299}.attention.weight float32 [2, 2] 300 x 16 B shard 0" in rows
    assert "layers.{0-6,8-299}.mlp.bias float32 [2] 299 x 8 B shard 0" in rows
    assert "layers.7.mlp.bias float32 [3] 12 B shard 0" in rows
    assert "experts.{0,2}.e.{0-3}.w float32 [1] 8 x 4 B shard 0" in rows
    assert main(["inspect", str(tmp_path / "c"), "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 1200
    assert main(["inspect", str(tmp_path / "c"), "--keys", "layers.7.*", "embed"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("layers.7.") == 4
    assert "layers.8." not in shown
    assert "embed" in shown


def test_inspect_of_nothing(tmp_path, capsys):
    shardckpt.save({}, tmp_path / "c")
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert "0 tensors" in capsys.readouterr().out


def test_classes_that_are_not_there_stand_in_no_way(tmp_path, capsys, monkeypatch):
    """No tool imports what a checkpoint names, and none needs it."""
    save_some(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, Phase.__module__)
        for more in (["inspect"], ["inspect", "--json"], ["verify"]):
            assert main([*more, str(tmp_path / "c")]) == 0
        again = ["reshard", str(tmp_path / "c"), str(tmp_path / "d"), "--shards", "2"]
        assert main(again) == 0
        assert "Phase.WARM" in capsys.readouterr().out
    assert shardckpt.load_state(tmp_path / "d")["phase"] is Phase.WARM


def test_a_file_of_another_library(lightning, capsys):
    assert main(["inspect", str(lightning)]) == 0
    text = capsys.readouterr().out
    assert "a torch file, written by Lightning 2.6" in text
    assert "state_dict.w  float32  [2, 3]" in text
    assert main(["inspect", str(lightning), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["library"] == "Lightning 2.6"
    assert facts["tensors"]["state_dict.w"]["shape"] == [2, 3]
    assert facts["values"]["epoch"] == 4
