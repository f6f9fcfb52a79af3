"""The commands ls, cp, rm, prune and du."""

from __future__ import annotations

import json
import os
import uuid

import pytest
import torch

import shardckpt
from shardckpt.cli.main import main
from shardckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    NotACheckpointError,
    StateError,
)
from shardckpt.state import file_groups
from shardckpt.storage.resolve import resolve

STATE = {"w": torch.arange(3_000_000.0), "step": 1}


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return str(tmp_path / "run") if request.param == "local" else f"memory://t/{uuid.uuid4().hex}"


@pytest.fixture
def run(folder):
    """A folder with the steps 0 to 3, which share a frozen layer."""
    layer = torch.nn.Linear(1000, 1000).requires_grad_(False)
    with shardckpt.CheckpointManager(folder) as manager:
        for step in range(4):
            state = {"layer": layer, "w": torch.full((1000,), step)}
            manager.save(step, state, metrics={"loss": abs(step - 1)})
    return folder


def steps(folder):
    return shardckpt.CheckpointManager(folder, label=None).all_steps()


def test_ls_lists_checkpoints_oldest_first(run, capsys):
    assert main(["ls", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == [f"step-{step}" for step in range(4)]
    assert found[0]["path"] == f"{run}/step-0"
    assert found[0]["size_bytes"] > 4_000_000
    assert main(["ls", run]) == 0
    assert capsys.readouterr().out.count("1 rank") == 4
    assert main(["ls", f"{run}/step-1"]) == 0
    assert capsys.readouterr().out.startswith("  step-1")
    assert main(["ls", f"{run}/nothing"]) == CheckpointNotFoundError.exit_code
    assert "expected: a checkpoint, or a folder of checkpoints" in capsys.readouterr().err


def test_ls_warns_of_a_checkpoint_that_cannot_be_read(tmp_path, capsys, caplog):
    for step in (1, 2):
        shardckpt.save({"step": step}, tmp_path / f"step-{step}")
    manifest = tmp_path / "step-1" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-10])
    assert main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split()[0] == "step-2"
    assert f"{tmp_path}/step-1 is left out: The manifest" in caplog.text


def test_prune_keeps_the_chosen_checkpoints(run, capsys):
    assert main(["prune", run, "--keep-last", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would remove") == 3
    assert steps(run) == [0, 1, 2, 3]
    unknown = ["--keep-best", "1", "--monitor", "los"]
    assert main(["prune", run, *unknown]) == StateError.exit_code
    assert "actual: loss" in capsys.readouterr().err
    assert steps(run) == [0, 1, 2, 3]
    options = ["--keep-last", "1", "--keep-best", "1", "--monitor", "loss"]
    assert main(["prune", run, *options]) == 0
    assert steps(run) == [1, 3]
    assert main(["prune", run]) == StateError.exit_code
    assert main(["prune", run, "--keep-best", "1"]) == StateError.exit_code
    assert main(["prune", f"{run}/x", "--keep-last", "1"]) == NotACheckpointError.exit_code


def test_rm_and_du(run, capsys):
    assert main(["du", run]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:4]] == [f"step-{step}" for step in range(4)]
    assert main(["rm", f"{run}/step-0", f"{run}/step-2"]) == 0
    assert steps(run) == [1, 3]
    assert main(["rm", f"{run}/step-0"]) == CheckpointNotFoundError.exit_code
    assert main(["rm", run]) == NotACheckpointError.exit_code
    assert steps(run) == [1, 3]


def test_linked_files_count_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(file_groups, "FROZEN_FILE_BYTES", 1)
    layer = torch.nn.Linear(1013, 997).requires_grad_(False)  # no other test's plan fits
    with shardckpt.CheckpointManager(tmp_path) as manager:
        for step in range(3):
            manager.save(step, {"layer": layer, "w": torch.full((1001,), step)})
    assert main(["du", str(tmp_path)]) == 0
    *_, total = capsys.readouterr().out.splitlines()
    assert total.split()[0].startswith("3.9"), total


def test_cp_copies_and_verifies(folder, tmp_path, capsys):
    source = str(tmp_path / "source")
    shardckpt.save(STATE, source)
    for target in (f"{folder}/a", f"{tmp_path}/b", f"memory://t/{uuid.uuid4().hex}"):
        assert main(["cp", source, target]) == 0
        assert torch.equal(shardckpt.load_state(target)["w"], STATE["w"])
        source = target
    shardckpt.save({"other": 1}, f"{folder}/c")
    assert main(["cp", source, f"{folder}/c"]) == CheckpointExistsError.exit_code
    assert main(["cp", source, f"{folder}/c", "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["cp", source, f"{folder}/c"]) == 0
    assert "already" in capsys.readouterr().out


def test_a_damaged_source_is_not_copied(tmp_path):
    shardckpt.save(STATE, tmp_path / "a")
    (shard,) = (tmp_path / "a").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[5_000_000] ^= 1
    shard.write_bytes(data)
    assert main(["cp", str(tmp_path / "a"), str(tmp_path / "b")]) == CorruptionError.exit_code
    assert os.listdir(tmp_path) == ["a"]


def test_an_interrupted_copy_goes_on(tmp_path, s3, monkeypatch):
    shardckpt.save(STATE, tmp_path / "one")
    shardckpt.reshard(tmp_path / "one", tmp_path / "a", shards=3)
    storage = resolve(s3).storage
    objects, _ = storage.at(s3)
    uploaded: list[str] = []
    upload = type(objects).upload

    def counted(self, key, **options):
        uploaded.append(key.rpartition("/")[2])
        if key.endswith("00002-of-00003.safetensors") and len(uploaded) < 6:
            raise KeyboardInterrupt
        return upload(self, key, **options)

    monkeypatch.setattr(type(objects), "upload", counted)
    assert main(["cp", str(tmp_path / "a"), s3]) == 130
    with pytest.raises((CheckpointNotFoundError, NotACheckpointError)):
        shardckpt.load_state(s3)
    uploaded += ["x"] * 9
    before = len(uploaded)
    assert main(["cp", str(tmp_path / "a"), s3]) == 0
    assert sorted(uploaded[before:]) == ["begun", "shard-00002-of-00003.safetensors"]
    assert torch.equal(shardckpt.load_state(s3)["w"], STATE["w"])


def test_ls_shows_the_state_in_each_tier(tmp_path, capsys):
    url = f"tiers://{tmp_path}/fast,{tmp_path}/slow"
    shardckpt.save(STATE, tmp_path / "source")
    assert main(["cp", str(tmp_path / "source"), f"{tmp_path}/fast/a"]) == 0
    capsys.readouterr()
    assert main(["ls", url]) == 0
    shown = capsys.readouterr().out
    assert f"durable in {tmp_path}/fast" in shown
    assert f"missing in {tmp_path}/slow" in shown
    assert main(["verify", f"tiers://{tmp_path}/fast/a,{tmp_path}/slow/a"]) == 0


def test_checkpoints_of_one_second_are_listed_by_their_numbers(tmp_path, capsys):
    for step in (10, 9, 2):
        shardckpt.save({"step": step}, tmp_path / f"step-{step}")
    texts = [path.read_text() for path in tmp_path.glob("*/manifest.json")]
    seconds = {json.loads(text)["created"] for text in texts}
    main(["ls", str(tmp_path)])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["step-2", "step-9", "step-10"] or len(seconds) > 1


def test_rm_removes_all_or_none_and_no_checkpoint_behind_a_link(tmp_path, capsys):
    for step in (1, 2):
        shardckpt.save({"step": step}, tmp_path / f"step-{step}")
    (tmp_path / "latest").symlink_to("step-2")
    first, second, link = (str(tmp_path / name) for name in ("step-1", "step-2", "latest"))
    for last in (f"{tmp_path}/nothing", link, f"{link}/"):
        assert main(["rm", first, last]) != 0
    assert f"pass the checkpoint itself, {second}" in capsys.readouterr().err
    for path, step in ((first, 1), (link, 2)):
        assert shardckpt.load_state(path)["step"] == step
    assert main(["rm", first, second, first]) == 0
    assert not (tmp_path / "step-1").exists()
    assert not (tmp_path / "step-2").exists()
