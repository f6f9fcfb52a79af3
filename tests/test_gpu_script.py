"""scripts/gpu, as a dry run on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.long
def test_a_dry_run_checks_and_prints_one_table(tmp_path):
    done = run("--device", "cpu", "--size", "0.1", "--rounds", "1", "--dir", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert not any(line.startswith("FAILED") for line in lines)
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows] == [
        "| seconds",
        "| save, durable",
        "| async_save, until staged",
        "| load, warm",
    ]
    columns = {name.strip(" |"): number for number, name in enumerate(rows[0])}
    for row in rows[1:]:
        for name in ("page-locked copy", "shardckpt", "DCP"):
            assert float(row[columns[name]].strip(" |")) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path):
    code = (
        "import importlib.util as u, runpy, sys\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'msgspec' else real(name, *more)\n"
        "sys.argv = ['gpu']\n"
        "runpy.run_module('device_bench', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "missing packages: msgspec;" in done.stderr
