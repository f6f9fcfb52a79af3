"""The commands verify, rescue and reshard."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt import PerRank
from shardckpt.cli.main import main
from shardckpt.cli.progress import size_text
from shardckpt.errors import CheckpointExistsError, CorruptionError


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


def flip_last_byte(folder) -> None:
    (shard,) = Path(folder).glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_verify_lists_corrupted_and_intact_tensors(saved, capsys):
    assert main(["verify", saved]) == 0
    assert capsys.readouterr().out == f"{saved}: 1 shard, 5 tensors, {size_of(saved)}: intact\n"
    flip_last_byte(saved)
    assert main(["verify", saved]) == CorruptionError.exit_code
    lines = capsys.readouterr().out.splitlines()
    words = [line.split()[0] for line in lines]
    assert words == sorted(words)
    assert set(words) == {"corrupted", "intact"}
    with shardckpt.open_checkpoint(saved) as checkpoint:
        report = checkpoint.verify(strict=False)
    assert [line.split()[1] for line in lines] == [*report.corrupted, *report.intact]


def size_of(folder) -> str:
    (shard,) = Path(folder).glob("*.safetensors")
    return size_text(shard.stat().st_size)


def test_verify_reads_a_part(tmp_path, capsys):
    shardckpt.save({"w": torch.arange(600_000.0), "v": torch.ones(9)}, tmp_path / "c")
    checked = 0
    for part in ("1/2", "2/2"):
        assert main(["verify", str(tmp_path / "c"), "--subset", part, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["subset"] == list(map(int, part.split("/")))
        checked += report["checked_bytes"]
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    assert checked == shard.stat().st_size
    assert main(["verify", str(tmp_path / "c"), "--subset", "2/2"]) == 0
    assert capsys.readouterr().out.endswith(": intact (part 2/2)\n")


def test_rescue_prints_what_it_saved_and_lost(tmp_path, capsys):
    shardckpt.save({"a": torch.arange(300_000.0), "b": torch.zeros(300_000)}, tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size - 9)
    target = str(tmp_path / "r")
    assert main(["rescue", str(tmp_path / "c"), target]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("lost     b: ")
    assert last == f"{target}: 1 tensor saved, 1 lost"
    assert list(shardckpt.load_state(target)) == ["a"]
    assert main(["rescue", str(tmp_path / "c"), target]) == CheckpointExistsError.exit_code
    assert main(["rescue", str(tmp_path / "c"), target, "--overwrite", "--json"]) == 0
    (tmp_path / "c" / "manifest.json").unlink()
    capsys.readouterr()
    assert main(["rescue", str(tmp_path / "c"), target, "--overwrite"]) == 0
    assert "The manifest was rebuilt" in capsys.readouterr().out


def test_a_repaired_bit_is_printed(tmp_path, capsys):
    shardckpt.save({"a": torch.zeros(300)}, tmp_path / "c")
    flip_last_byte(tmp_path / "c")
    assert main(["rescue", str(tmp_path / "c"), str(tmp_path / "r")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("repaired ")
    assert lines[-1].endswith(": 1 tensor saved, 0 lost")


def test_reshard_prints_the_size_of_its_target(saved, tmp_path, capsys):
    target = str(tmp_path / "t")
    assert main(["reshard", saved, target, "--shards", "2"]) == 0
    assert capsys.readouterr().out == f"{target}: 2 shards, 64 B\n"


def test_a_bit_of_the_manifest_that_flipped_is_named(saved, capsys):
    manifest = Path(saved) / "manifest.json"
    data = bytearray(manifest.read_bytes())
    data[50] ^= 1
    manifest.write_bytes(data)
    assert main(["verify", saved]) == CorruptionError.exit_code
    error = capsys.readouterr().err
    assert "bit 0 of byte 50 flipped" in error
    assert "repair it with `shardckpt rescue`" in error
