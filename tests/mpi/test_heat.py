"""The example: a plate in 4 parts, stopped, resumed in 2 and in 3, equal to one never stopped."""

from __future__ import annotations

import numpy as np
import pytest

import shardckpt
from tests.mpi.launch import needs, run_job

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(500), needs("openmpi")]


def never_stopped(size: int, steps: int) -> np.ndarray:
    """The same, written without ranks, borders and checkpoints."""
    row, column = np.indices((size, size))
    hot = (row - size / 3) ** 2 + (column - size / 2) ** 2 < size**2 / 25
    u = np.pad(100.0 * hot, 1)
    for _ in range(steps):
        around = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]
        u = np.pad(u[1:-1, 1:-1] + 0.2 * (around - 4.0 * u[1:-1, 1:-1]), 1)
    return u[1:-1, 1:-1]


@pytest.mark.long
def test_heat_on_any_ranks(tmp_path):
    job = run_job("openmpi", 4, "heat", str(tmp_path), folder=tmp_path / "out")
    job.checked()
    assert "2 ranks, steps 60 to 90" in job.output
    assert "3 ranks, steps 40 to 90" in job.output
    assert "step-000060 is passed over" in job.output
    expected = never_stopped(45, 90)
    for name in ("two", "three"):
        assert np.array_equal(shardckpt.load_state(tmp_path / name / "step-000090")["u"], expected)
