"""Commands shared by several processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import shardckpt
from shardckpt.cli.main import main

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "shardckpt", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_processes_share_the_work(tmp_path):
    state = {"a": torch.arange(3_000_000.0), "b": torch.arange(7), "step": 3}
    shardckpt.save(state, tmp_path / "c")
    done = command("reshard", tmp_path / "c", tmp_path / "d", "--world-size", 3, "--jobs", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 shards") == 1
    back = shardckpt.load_state(tmp_path / "d")
    assert torch.equal(back["a"], state["a"])
    assert torch.equal(back["b"], state["b"])
    assert back["step"] == 3
    (tmp_path / "d" / "shard-00001-of-00003.safetensors").unlink()
    done = command("verify", tmp_path / "d", "--jobs", 3)
    assert done.returncode == 6, done.stderr
    assert "shard-00001-of-00003.safetensors" in done.stderr
    assert done.stdout.splitlines() == ["hurt   a", "whole  b"]


def test_jobs_is_a_number():
    with pytest.raises(SystemExit) as left:
        main(["verify", "x", "--jobs", "0"])
    assert left.value.code == 2
