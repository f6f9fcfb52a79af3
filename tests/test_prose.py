"""The prose of the documentation has none of the unclear patterns that scripts/prose finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROSE = Path(__file__).parent.parent / "scripts" / "prose"


def run(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PROSE, *paths]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_documentation_is_clear():
    done = run()
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        "This is no path for a checkpoint.",
        "The rest stays. What says so is collective.",
        "Bytes are counted. Of the elements.",
        "Seen is the order that torch uses.",
        "The tensors that are hurt.",
    ],
)
def test_an_unclear_sentence_is_found_with_its_line(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{text}\n")
    done = run(page)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{page}:3: ")


def test_docstrings_and_errors_of_python_are_read(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('"""Fine."""\n\n\ndef f():\n    raise StateError("This is no step")\n')
    done = run(module)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{module}:5: ")


def test_code_is_not_prose(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("See `x is no y`.\n\n```text\nthis is no prose\n```\n")
    assert run(page).returncode == 0
