"""Rescue: the saved, the lost and the repaired tensors, and the messages about them."""

from __future__ import annotations

import os

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.api import rescue
from shardckpt.cli.main import main
from shardckpt.maintenance.reshard import reshard
from shardckpt.storage.local import LocalStorage

STATE = {
    "model": {"w": torch.arange(600_000.0).reshape(600, 1000), "b": torch.ones(7)},
    "list": [torch.zeros(2), 5],
    "step": 3,
}
SHARDS = [f"shard-0000{rank}-of-00002.safetensors" for rank in range(2)]


@pytest.fixture
def damaged(tmp_path):
    """Two shards; w lies in both."""
    shardckpt.save(STATE, tmp_path / "one")
    with shardckpt.open_checkpoint(tmp_path / "one") as opened:
        reshard(opened, str(tmp_path / "c"), shards=2, storage=LocalStorage())
    return tmp_path / "c"


def change(path, at, value=None, *, flip=0):
    data = bytearray(path.read_bytes())
    data[at] = data[at] ^ flip if value is None else value
    path.write_bytes(data)


def rescued(damaged):
    target = damaged.parent / "rescued"
    report = rescue(str(damaged), str(target), storage=LocalStorage())
    with shardckpt.open_checkpoint(target) as opened:
        opened.verify()
        notes = opened.manifest.notes
    return report, shardckpt.load_state(target), notes


def equal(found, expected):
    return torch.equal(found["model"]["w"], expected["model"]["w"]) and found["step"] == 3


def test_an_intact_checkpoint_is_saved_completely(damaged):
    report, state, _ = rescued(damaged)
    assert not report.lost
    assert not report.repaired
    assert equal(state, STATE)


def test_a_corrupted_tensor_is_left_out(damaged):
    shard = damaged / SHARDS[0]
    for at in (1 << 20, (1 << 20) + 1):  # in a block that w alone has
        change(shard, at, flip=0xFF)
    report, state, notes = rescued(damaged)
    assert list(report.lost) == ["model.w"]
    assert "model.w" in notes["rescued: lost"]
    assert sorted(report.saved) == ["list.0", "model.b"]
    assert list(state["model"]) == ["b"]
    assert state["list"][1] == 5
    assert state["step"] == 3


def test_a_flipped_bit_is_repaired(damaged):
    change(damaged / SHARDS[1], 1_100_000, flip=4)
    report, state, notes = rescued(damaged)
    assert not report.lost
    assert "bit 2 of byte 1100000" in report.repaired[0]
    assert "1100000" in notes["rescued: repaired"]
    assert equal(state, STATE)


@pytest.mark.parametrize("flip", [1, 64])
@pytest.mark.parametrize("at", [40, 300, -10, -3])
def test_a_flipped_bit_of_the_manifest(damaged, at, flip, capsys):
    change(damaged / "manifest.json", at, flip=flip)
    with pytest.raises(errors.CheckpointError):
        shardckpt.load_state(damaged)
    report, state, _ = rescued(damaged)
    assert not report.rebuilt
    assert equal(state, STATE)


def test_a_missing_shard(damaged):
    os.unlink(damaged / SHARDS[0])
    report, state, _ = rescued(damaged)
    assert list(report.lost) == ["model.w"]
    assert "missing" in report.lost["model.w"]
    assert state["model"]["b"].tolist() == [1.0] * 7
    assert state["step"] == 3


def test_all_tensors_lost_and_the_values_kept(damaged):
    for shard in SHARDS:
        os.unlink(damaged / shard)
    report, state, _ = rescued(damaged)
    assert not report.saved
    assert state == {"list": [None, 5], "step": 3, "model": {}}


def test_tensors_before_the_end_of_a_truncated_shard_are_saved(damaged):
    os.truncate(damaged / SHARDS[0], (damaged / SHARDS[0]).stat().st_size - 4)
    report, _, _ = rescued(damaged)
    assert report.lost
    assert report.saved


def test_appended_bytes_corrupt_no_tensor(damaged):
    with open(damaged / SHARDS[0], "ab") as file:
        file.write(b"more")
    report, state, _ = rescued(damaged)
    assert not report.lost
    assert equal(state, STATE)


def test_a_lost_manifest_is_rebuilt_and_marked(damaged, capsys):
    os.unlink(damaged / "manifest.json")
    report, state, notes = rescued(damaged)
    assert report.rebuilt
    assert not report.lost
    assert "rebuilt" in notes["rescued"]
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert "step" not in state
    model = torch.nn.ParameterDict({"w": torch.zeros(600, 1000), "b": torch.zeros(7)})
    shardckpt.load({"model": model}, damaged.parent / "rescued")
    assert torch.equal(model["w"], STATE["model"]["w"])
    assert main(["rescue", str(damaged), str(damaged.parent / "again")]) == 0
    assert "rebuilt from the headers of the shards" in capsys.readouterr().out


def test_a_lost_manifest_and_a_lost_shard(damaged):
    """A tensor in pieces is lost, because its size is unknown."""
    os.unlink(damaged / "manifest.json")
    os.unlink(damaged / SHARDS[0])
    report, _, _ = rescued(damaged)
    assert report.lost["model.w"] == "it is in pieces, and a shard is missing"
    assert report.saved


def test_a_checkpoint_without_intact_tensors_is_an_error(damaged):
    for name in os.listdir(damaged):
        os.truncate(damaged / name, 5)
    with pytest.raises(errors.CorruptionError, match="Nothing"):
        rescue(str(damaged), str(damaged.parent / "rescued"), storage=LocalStorage())
    assert not (damaged.parent / "rescued").exists()


def test_verify_and_rescue_report_corruption_on_the_command_line(damaged, capsys):
    assert main(["verify", str(damaged), "--subset", "1/2"]) == 0
    assert "intact (part 1/2)" in capsys.readouterr().out
    change(damaged / "manifest.json", 300, flip=1)
    assert main(["verify", str(damaged)]) == 6
    assert "bit 0 of byte 300 flipped" in capsys.readouterr().err
    change(damaged / "manifest.json", 300, flip=1)
    for at in (1 << 20, (1 << 20) + 1):
        change(damaged / SHARDS[0], at, flip=0xFF)
    assert main(["verify", str(damaged)]) == 6
    out, err = capsys.readouterr()
    assert out.splitlines() == ["corrupted model.w", "intact    model.b", "intact    list.0"]
    assert SHARDS[0] in err
    assert main(["rescue", str(damaged), str(damaged.parent / "r")]) == 0
    out = capsys.readouterr().out
    assert "lost     model.w" in out
    assert "2 tensors saved, 1 lost" in out
    with pytest.raises(SystemExit):
        main(["verify", str(damaged), "--subset", "3/2"])
