"""The examples under docs/examples run; the demo runs digits.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "char_lm.py"


def test_the_character_model(tmp_path):
    def run(*arguments: object) -> str:
        command = [sys.executable, EXAMPLE, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=110, check=True
        ).stdout

    run("train", tmp_path / "lm", 3000)
    assert [path.name for path in (tmp_path / "lm").iterdir()]
    run("train", tmp_path / "lm", 3000)  # nothing is left to do
    assert len(run("write", tmp_path / "lm")) > 150
