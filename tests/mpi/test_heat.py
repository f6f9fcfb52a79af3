"""The example: a plate in 4 parts, stopped, resumed in 2 and in 6, equal to one never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import shardckpt
from tests.mpi.launch import needs, run_program

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(500), needs("openmpi")]
HEAT = str(Path(__file__).parents[2] / "docs/examples/heat.py")


def never_stopped(size: int, steps: int) -> np.ndarray:
    """The same, written without ranks, borders and checkpoints."""
    row, column = np.indices((size, size))
    hot = (row - size / 3) ** 2 + (column - size / 2) ** 2 < size**2 / 25
    u = np.pad(100.0 * hot, 1)
    for _ in range(steps):
        around = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]
        u = np.pad(u[1:-1, 1:-1] + 0.2 * (around - 4.0 * u[1:-1, 1:-1]), 1)
    return u[1:-1, 1:-1]


def heat(ranks: int, out: Path, steps: int) -> str:
    done = run_program("openmpi", ranks, HEAT, str(out), "--steps", str(steps), "--size", "45")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_heat_on_any_ranks(tmp_path):
    heat(4, tmp_path / "two", 60)
    shutil.copytree(tmp_path / "two", tmp_path / "six")
    shard = sorted((tmp_path / "six/step-000060").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])  # its newest is damaged: it resumes from step 40
    assert "2 ranks, steps 60 to 90" in heat(2, tmp_path / "two", 90)
    assert "6 ranks, steps 40 to 90" in heat(6, tmp_path / "six", 90)
    expected = never_stopped(45, 90)
    for name in ("two", "six"):
        assert np.array_equal(shardckpt.load_state(tmp_path / name / "step-000090")["u"], expected)
