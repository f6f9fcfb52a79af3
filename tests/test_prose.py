"""Documentation, package, scripts and tests have no unclear pattern that scripts/prose finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROSE = Path(__file__).parent.parent / "scripts" / "prose"


def run(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PROSE, *paths]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "names",
    [
        ("docs", "README.md", "CHANGELOG.md", "shardckpt"),
        pytest.param(("scripts", "tests"), marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_documentation_and_code_are_clear(names):
    done = run(*(PROSE.parent.parent / name for name in names))
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
        "The report lists the rest. Known is the number of ranks.",
        "A copy is made, what is left stays.",
        "The bytes are read. As load, for one rank.",
        "Nothing but tensors can be saved.",
        "Rank 0 is told the path.",
        "Saved by rank 0. Those of other ranks are ignored.",
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


@pytest.mark.parametrize(
    "code",
    [
        "x = 1  # what is left of it",
        'NAMES = ()\n"""What a checkpoint holds."""',
        'async def f():\n    """Fine.\n\n    Args:\n        x: What was saved.\n    """',
        'def f(x):\n    raise StateError(f"{x} is no step")',
    ],
)
def test_comments_and_all_docstrings_of_python_are_read(tmp_path, code):
    module = tmp_path / "module.py"
    module.write_text(f"{code}\n")
    assert run(module).returncode == 1


def test_a_sentence_over_several_comment_lines_is_one_sentence(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "# The ranks that are not\n# Those of this job.\n# What they do is unknown.\n"
    )
    done = run(module)
    assert done.stdout.startswith(f"{module}:1: ")


def test_examples_in_docstrings_are_not_prose(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('"""Fine.\n\n>>> this is no prose\n... what is this\n"""\n')
    assert run(module).returncode == 0
