"""The commands convert and extract, and JSON of the commands that write checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardckpt
from shardckpt.cli.main import main
from shardckpt.errors import LoadMismatchError


def test_extract_a_prefix(saved, tmp_path, capsys):
    assert main(["extract", saved, "model", str(tmp_path / "w.safetensors")]) == 0
    names = ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert sorted(load_file(tmp_path / "w.safetensors")) == names
    assert main(["extract", saved, "model.0", str(tmp_path / "x.pt"), "--dtype", "bfloat16"]) == 0
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {name: value.dtype for name, value in found.items()} == {
        "weight": torch.bfloat16,
        "bias": torch.bfloat16,
    }


def test_extract_entries_and_patterns_keeps_their_names(saved, tmp_path, capsys):
    target = str(tmp_path / "w.safetensors")
    assert main(["extract", saved, "*.bias", "step", target, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(report["tensors"]) == ["model.0.bias", "model.1.bias"]
    assert report["values"] == ["step"]
    assert main(["extract", saved, "model.1.bias", target, "--overwrite"]) == 0
    assert list(load_file(target)) == ["model.1.bias"]
    assert main(["extract", saved, "nothing", target]) == LoadMismatchError.exit_code
    error = capsys.readouterr().err
    assert "NAMES names 'nothing'" in error
    assert "keys=" not in error


def test_extract_needs_a_name(saved, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["extract", saved, str(tmp_path / "w.pt")])
    assert caught.value.code == 2


def test_reshard_cp_rm_and_du_print_json(saved, tmp_path, capsys):
    def shown(*arguments):
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    copy, again = str(tmp_path / "copy"), str(tmp_path / "again")
    assert shown("reshard", saved, again, "--shards", "2")["shards"] == 2
    first = shown("cp", saved, copy)
    assert (first["path"], first["copied"]) == (copy, True)
    assert shown("cp", saved, copy)["copied"] is False
    sizes = shown("du", str(tmp_path))
    assert set(sizes["checkpoints"]) == {"c", "copy", "again"}
    assert sizes["size_bytes"] == sum(sizes["checkpoints"].values())
    assert shown("rm", copy, again) == {"removed": [copy, again]}
    assert not Path(copy).exists()


def test_prune_prints_json(tmp_path, capsys):
    with shardckpt.CheckpointManager(tmp_path / "run") as manager:
        for step in range(3):
            manager.save(step, {"w": torch.ones(1)})
    run = str(tmp_path / "run")
    assert main(["prune", run, "--keep-last", "1", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "removed": [f"{run}/step-0", f"{run}/step-1"],
        "kept": [f"{run}/step-2"],
        "dry_run": True,
    }
    assert len(list((tmp_path / "run").glob("step-*"))) == 3
    shutil.rmtree(run)
