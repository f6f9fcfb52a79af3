"""Saves killed at random moments, and at each of their system calls."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.faults import syscalls


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=110
    )


def test_acknowledged_checkpoints_survive_random_kills(tmp_path):
    done = run("tests.faults.kills", str(tmp_path), "--seed", "9", "--count", "15")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(
            "forget", "was acknowledged|were acknowledged|leftovers", marks=pytest.mark.long
        ),
        ("remove", "were acknowledged"),
    ],
)
def test_planted_faults_are_seen(tmp_path, fault, said):
    """Saves that are acknowledged and published nowhere; removal of one too many."""
    command = ["tests.faults.kills", str(tmp_path), "--seed", "9", "--count", "200"]
    done = run(*command, "--plant", fault)  # it ends with the first that is found
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.skipif(not syscalls.available(), reason="strace is not installed")
@pytest.mark.parametrize("first", [3, pytest.param(6, marks=pytest.mark.long)])
def test_faults_by_strace(first):
    """Each fault at one of the first calls: 15 variants lie between two faults at the same call."""
    done = run("tests.faults.syscalls", str(first), "15")
    if "Operation not permitted" in done.stderr or "does not attach" in done.stderr:
        pytest.skip("no right to trace")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[2]) > 2
