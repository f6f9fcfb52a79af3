"""All code on the pages of the documentation runs. scripts/docs runs the pages; the default tests
only check that all code is run."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.docs_code import blocks, script, unfenced
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
RUN = {"python", "sh"}
SHOWN = {"text", "json"}  # commands for clusters, output, grammar


def run(page: Path, folder: Path) -> None:
    """Run the code of a page in a new process, in a folder; an error fails the test.

    The process is forked from one that has imported torch.
    """
    (folder / "page.py").write_text(script(page.read_text()))
    run_ranks(1, in_folder, str(folder), timeout_s=280)


def in_folder(folder: str) -> None:
    dist.destroy_process_group()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.update(PATH=path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    os.chdir(folder)
    sys.path.insert(0, folder)
    runpy.run_path("page.py", run_name="__main__")


def needed(text: str) -> set[str]:
    """The packages of scripts/integrations that the code of a page imports."""
    code = "".join(block.code for block in blocks(text))
    packages = "accelerate|lightning|peft|torchdata|torchft|torchtitan|transformers"
    integrations = rf"^from shardckpt\.integrations\.({packages})\b"
    return {
        package
        for pattern in (rf"^(?:import|from) ({packages})\b", integrations)
        for package in re.findall(pattern, code, re.MULTILINE)
    }


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.ranks
@pytest.mark.pages
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if RUN & {block.language for block in blocks(page.read_text())}],
    ids=name,
)
def test_the_code_of_a_page_runs(page, tmp_path):
    for package in needed(page.read_text()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; scripts/integrations runs this page")
    run(page, tmp_path)


def test_the_packages_that_a_page_needs_are_found():
    page = ROOT / "docs" / "how-to" / "transformers.md"
    assert needed(page.read_text()) == {"peft", "transformers"}
    assert needed((ROOT / "README.md").read_text()) == set()


@pytest.mark.ranks
@pytest.mark.parametrize("code", ["```python\n1 / 0\n```\n", "```sh\nfalse\ntrue\n```\n"])
def test_code_that_fails_would_be_seen(code, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"A page.\n\n{code}")
    with pytest.raises(AssertionError, match=r"ZeroDivisionError|CalledProcessError"):
        run(page, tmp_path)


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
