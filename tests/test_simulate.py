"""scripts/simulate, at a size of a few ranks. Each run is a process: it plays all ranks in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def simulated(*arguments: str) -> subprocess.CompletedProcess[str]:
    where = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.long
@pytest.mark.parametrize("layout", ["hsdp", "tp"])
def test_a_small_world(layout, tmp_path):
    done = simulated("-m", "simulation", "--json", "--layout", layout, "16x6")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    chunks = {"hsdp": 8, "tp": 16}[layout] * 6
    assert found["chunks"] == chunks
    first, again = found["saves"]["first save"], found["saves"]["repeated save"]
    for who in ("rank 0", "ordinary rank"):
        assert [phase["name"] for phase in first[who]] == ["plan", "divide", "write"]
        assert [phase["name"] for phase in again[who]] == ["plan", "join", "write"]
    for load in found["loads"].values():
        assert min(load["manifest"], load["match"], load["reads"], load["memory_bytes"]) > 0
    results = tmp_path / "results.json"
    results.write_text(json.dumps([found]))
    rows = table_and_plot(results)
    assert len(rows) == 1
    assert rows[0].startswith("| 16 x 6 |")


def table_and_plot(results: Path) -> list[str]:
    """Draw the picture of results, and return the rows of their table."""
    pytest.importorskip("matplotlib")
    picture = results.with_suffix(".svg")
    done = simulated("-m", "simulation", "--plot", str(results), str(picture))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "</svg>" in picture.read_text()
    done = simulated("-m", "simulation", "--table", str(results))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[2:]


@pytest.mark.long
def test_the_growth_of_a_few_sizes(tmp_path):
    results = tmp_path / "few.json"
    done = simulated("-m", "simulation", "--growth", str(results), "2x3", "4x3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row.split("|")[1] for row in table_and_plot(results)] == [" 2 x 3 ", " 4 x 3 "]


def test_the_table_of_the_docs_is_that_of_its_results(tmp_path):
    (tmp_path / "scale.json").write_text((ROOT / "docs/scale.json").read_text())
    page = (ROOT / "docs/scale.md").read_text()
    assert "\n".join(table_and_plot(tmp_path / "scale.json")) in page


def test_plans_that_are_not_the_library_s_are_seen():
    """The made-up plans are compared with real ones."""
    done = simulated(
        "-c",
        "import simulation.world as world, simulation.run as run\n"
        "world.World.plans = lambda self, first: [first] * self.ranks\n"
        "run.simulate(world.World(ranks=4, tensors=2))",
    )
    assert "is not what the library makes" in done.stderr


def test_a_size_that_is_none():
    done = simulated("-m", "simulation", "12y3")
    assert done.returncode == 2
    assert "1024x1000 is expected" in done.stderr
