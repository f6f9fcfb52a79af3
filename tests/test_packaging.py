"""The requirements that pyproject.toml, the pages and the table of versions name are the same."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from shardckpt import torch_compat

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


TABLE = (ROOT / "docs" / "versions.md").read_text()


def test_the_lowest_torch_is_that_of_the_table_of_versions(project):
    (torch,) = (entry for entry in project["dependencies"] if entry.startswith("torch"))
    rows = re.findall(r"^\| ([\d.]+) \| 3", TABLE, re.MULTILINE)
    assert set(rows) <= set(torch_compat.TRIED)
    lowest = rows[0].rpartition(".")[0]
    assert torch == f"torch>={lowest},<3"
    for page in ("README.md", "docs/installation.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert f"Linux, Python 3.10 or later, and PyTorch {lowest} or later" in text


def test_the_classifiers_are_the_pythons_of_the_table(project):
    pythons = set(re.findall(r"^\| [\d.]+ \| (3\.\d+) \|", TABLE, re.MULTILINE))
    assert set(re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))) == pythons


def test_the_top_level_holds_these_names_and_no_others():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("a source archive, without git")
    folders = {".ci", "docs", "scripts", "shardckpt", "tests"}
    texts = {"CHANGELOG.md", "LICENSE", "README.md"}
    settings = {".gitignore", "pyproject.toml", "setup.cfg"}
    found = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    assert found == folders | texts | settings


@pytest.mark.skipif(not importlib.util.find_spec("hatchling"), reason="hatchling builds")
def test_the_wheel_and_the_source_archive_are_complete(tmp_path):
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "site", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    build = "from hatchling import build as b; b.build_wheel('out'); b.build_sdist('out')"
    (copy / "out").mkdir()
    run = [sys.executable, "-c", build]
    subprocess.run(run, cwd=copy, check=True, capture_output=True, timeout=120)
    (wheel,) = (copy / "out").glob("*.whl")
    (source,) = (copy / "out").glob("*.tar.gz")
    suffixes = (".py", ".html", ".typed")
    package = [path for path in (ROOT / "shardckpt").rglob("*") if path.suffix in suffixes]
    modules = {str(path.relative_to(ROOT)) for path in package}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in in_wheel if ".dist-info/" not in name}
    assert code == modules
    assert any(name.endswith("licenses/LICENSE") for name in in_wheel)
    with tarfile.open(source) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert modules <= files
    wanted = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "setup.cfg"}
    wanted |= {"docs/format.md", "scripts/test", "scripts/mkdocs.yml"}
    wanted |= {"tests/test_api.py", "tests/conftest.py"}
    assert wanted <= files
    assert not {name for name in files if name.endswith(".pyc") or name.startswith(".git")}
