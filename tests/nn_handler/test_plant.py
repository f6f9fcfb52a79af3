"""Every fault of a facade is planted somewhere, and the planting still fits the source."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.nn_handler.plant import PLANTS, ROOT


def test_the_plants_fit():
    assert {plant.fault for plant in PLANTS} == set(range(1, 23))
    for plant in PLANTS:
        for file, text, other in plant.changes:
            source = (ROOT / file).read_text()
            assert source.count(text) == 1, (plant, text)
            ast.parse(source.replace(text, other))
        file, _, test = plant.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(), plant


@pytest.mark.long
def test_planted_faults_are_seen():
    """One that is quick; python -m tests.nn_handler.plant for all."""
    command = [sys.executable, "-m", "tests.nn_handler.plant", "18"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:6] for line in lines] == ["ok   0", "ok  18"]


@pytest.mark.long
def test_the_test_that_sees_a_fault_may_be_a_long_one():
    test = "tests/nn_handler/test_ranks.py::test_a_signal_to_one_rank_stops_all_at_one_step[ddp]"
    code = f"from tests.nn_handler import plant; print(plant.run(plant.Plant(0, '', (), '{test}')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "passes\n", done.stderr
