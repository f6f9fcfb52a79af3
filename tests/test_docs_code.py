"""All code on the pages of the documentation runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs_code import blocks, script, unfenced

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
RUN = {"python", "sh"}
SHOWN = {"text", "json"}  # commands for clusters, output, grammar


def run(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    (folder / "page.py").write_text(script(page.read_text()))
    return subprocess.run(
        [sys.executable, "page.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.ranks
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if RUN & {block.language for block in blocks(page.read_text())}],
    ids=name,
)
def test_the_code_of_a_page_runs(page, tmp_path):
    done = run(page, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("code", ["```python\n1 / 0\n```\n", "```sh\nfalse\ntrue\n```\n"])
def test_code_that_fails_would_be_seen(code, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"A page.\n\n{code}")
    assert run(page, tmp_path).returncode != 0


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_code_of_a_page_is_hidden_from_the_tests(page):
    text = page.read_text()
    assert {block.language for block in blocks(text)} <= RUN | SHOWN
    assert unfenced(text) == []
    shown = [block.code for block in blocks(text) if block.language == "text"]
    assert not [code for code in shown if "import shardckpt" in code or "shardckpt.save(" in code]


def test_hidden_code_would_be_seen():
    assert unfenced("Text:\n\n    import shardckpt\n") == ["    import shardckpt"]
    assert unfenced("- point\n\n    of a list\n") == []
    assert [block.language for block in blocks("```\nplain\n```\n")] == [""]
