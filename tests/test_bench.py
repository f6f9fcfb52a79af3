"""The benchmark runs, prints its results, and detects wrong values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return __import__("benchmarks.table", fromlist=["table"])


def run_bench(folder: Path, *arguments: str) -> str:
    """The output of the benchmark."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--rounds", "1", "--dir", str(folder)],
        env={**os.environ, "PYTHONPATH": f"{SCRIPTS}:{SCRIPTS.parent}"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert found.returncode == 0, found.stderr
    assert " is out:" not in found.stdout, found.stdout
    assert not list(folder.glob("shardckpt-bench-*")), "it cleans up"
    return found.stdout


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_case_runs(tmp_path):
    options = f"small --small 20 --json {tmp_path}/out.json --markdown {tmp_path}/out.md"
    # The other peers take seconds to import.
    run_bench(tmp_path, *options.split(), "--peers", "shardckpt;torch.save")
    assert "20 small tensors, load, warm" in (tmp_path / "out.md").read_text()
    samples = json.loads((tmp_path / "out.json").read_text())["samples"]["small, save"]["samples"]
    assert {"shardckpt", "torch.save", "raw, O_DIRECT, 1 threads a rank"} <= set(samples)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_cases_with_background_saves_run(tmp_path):
    cases = "async async-replicated train --size-mb 8"
    printed = run_bench(tmp_path, *cases.split(), "--peers", "shardckpt;DCP")
    assert printed.count("shardckpt ") == 6, printed


def test_ratios_and_verdicts(benchmarks):
    targets = [
        benchmarks.Target(against="DCP", factor=2),
        benchmarks.Target(against="raw", factor=1.2),
        benchmarks.Target(against="limit", factor=0.5),
    ]
    row = benchmarks.Row(
        title="save",
        unit="s",
        figures={"shardckpt": 0.4, "DCP": 0.9, "torch.save": 0.3, "raw": 0.3},
        targets=targets,
    )
    assert row.ratios() == pytest.approx({"vs DCP": 2.25, "vs best other": 0.75, "of raw": 4 / 3})
    assert [line.endswith(" reached") for line in row.verdicts()] == [True, False, True, False]
    assert "| save (s) | 0.4 | 0.9 | 0.3 | 0.3 |" in benchmarks.as_markdown([row])


def test_the_trainer_takes_as_many_steps_as_the_loop_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import ranks, trainer

    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(self))
    found = trainer._job(ranks.Place(rank=0, world_size=1), 3, 1)
    assert set(found.samples) == {"raw, a loop by hand", "shardckpt"}
    assert not found.failures
    assert [steps.count(optimizer) for optimizer in dict.fromkeys(steps)] == [6, 6]


def test_a_wrong_value_is_seen(benchmarks):
    from benchmarks.states import Check

    state = {"model": {"a": torch.arange(6.0), "b": torch.ones(2)}}
    check = Check(state)
    check.verify(state)
    state["model"]["b"][1] = 2
    with pytest.raises(AssertionError, match="tensor 1"):
        check.verify(state)


def test_a_later_run_replaces_a_row(benchmarks):
    import dataclasses

    target = benchmarks.Target(against="DCP", factor=2)
    rows = [
        benchmarks.Row(title=title, unit="s", figures={"shardckpt": seconds}, targets=[target])
        for title, seconds in (("save", 2.0), ("load", 1.0), ("save", 3.0))
    ]
    again = benchmarks.from_json(json.loads(json.dumps([dataclasses.asdict(r) for r in rows[:2]])))
    assert again == rows[:2]
    found = benchmarks.merged(again, rows[2:])
    assert [(row.title, row.figures["shardckpt"]) for row in found] == [("save", 3), ("load", 1)]
