"""The rules of the house: the public names, import layers, sizes of files and functions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shardckpt

PACKAGE = Path(shardckpt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    {"errors", "_version", "closing", "knobs", "reports"},
    {"format"},
    {"planning"},
    {"storage", "coordination"},
    {"execution", "checkpoint"},
    {"api", "integrations", "convert", "testing"},
    {"manager"},
    {"nn_handler", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def upward_imports(source: str, own: str) -> list[str]:
    """What a module of the package imports from above its layer."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardckpt."):
            names = [node.module.split(".")[1]]
        elif isinstance(node, ast.ImportFrom) and node.module == "shardckpt":
            names = [alias.name for alias in node.names if alias.name in LEVEL]
        else:
            continue
        found += [name for name in names if LEVEL[name] > LEVEL[own]]
    return found


def test_no_import_runs_upwards():
    for path in FILES:
        if part(path) in LEVEL:
            allowed = {"execution"} if part(path) == "checkpoint" else set()
            assert set(upward_imports(path.read_text(), part(path))) <= allowed, path


def test_every_module_has_its_layer():
    assert {part(path) for path in FILES} - {"__init__"} == set(LEVEL) & {
        part(path) for path in FILES
    }


def test_an_upward_import_would_be_seen():
    assert upward_imports("from shardckpt.api import save", "format") == ["api"]


def too_long(source: str, *, lines: int, function_lines: int) -> list[str]:
    found = [f"{source.count(chr(10))} lines"] if source.count("\n") > lines else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = (node.end_lineno or 0) - node.lineno + 1
            found += [f"{node.name}: {size}"] if size > function_lines else []
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    assert not too_long(path.read_text(), lines=450, function_lines=75)


def test_a_long_function_would_be_seen():
    assert too_long("def f():\n" + "    x = 1\n" * 99, lines=400, function_lines=75) == ["f: 100"]


def test_the_public_names():
    assert list(shardckpt.__all__) == sorted(shardckpt.__all__)
    for name in shardckpt.__all__:
        assert getattr(shardckpt, name).__doc__ or name == "__version__", name
    with pytest.raises(AttributeError):
        getattr(shardckpt, "nothing")  # noqa: B009


def outside_imports(source: str) -> set[str]:
    """The top names of what a module imports from outside the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - {"shardckpt"}


def distributions(project: dict[str, Any], requirements: list[str]) -> set[str]:
    """The names that requirements bring in, through extras of our own too."""
    found: set[str] = set()
    for requirement in requirements:
        own = re.fullmatch(r"shardckpt\[(.*)\]", requirement)
        if own:
            for extra in own[1].split(","):
                found |= distributions(project, project["optional-dependencies"][extra])
        else:
            found.add(re.split(r"[\[<>=~! ]", requirement)[0].replace("-", "_"))
    return found


def test_scripts_check_installs_all_that_is_imported():
    """mypy reads every import: what is only in another extra would be missing in a fresh clone."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    check = project["optional-dependencies"]["check"]
    brought = distributions(project, project["dependencies"] + check)
    imported = set().union(*(outside_imports(path.read_text()) for path in FILES))
    assert imported <= brought
    assert "rich" in imported
    assert "rich" not in distributions(project, project["dependencies"] + ["mypy>=1"])


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_import_is_light():
    """`import shardckpt` brings in neither DTensor nor any extra."""
    code = "import torch, sys; before = set(sys.modules); import shardckpt; "
    loaded = run(code + "print(*(set(sys.modules) - before))").split()
    assert {name.split(".")[0] for name in loaded} <= {"shardckpt"}


def test_extras_are_optional(tmp_path):
    """Saving, loading and the command work where no extra is installed."""
    code = f"""
import sys
for name in ("rich", "mpi4py", "sklearn", "mkdocs", "hypothesis", "pytest"):
    sys.modules[name] = None
import torch, shardckpt
from shardckpt.cli.main import main
shardckpt.save({{"a": torch.ones(3)}}, {str(tmp_path / "c")!r})
print(shardckpt.load_state({str(tmp_path / "c")!r})["a"].tolist())
assert main(["verify", {str(tmp_path / "c")!r}]) == 0
import shardckpt.nn_handler, shardckpt.integrations.dcp
"""
    assert run(code).startswith("[1.0, 1.0, 1.0]")


def test_every_knob_is_documented():
    """Each environment variable of knobs.py stands in the troubleshooting page, and no other."""
    named = set(re.findall(r"SHARDCKPT_[A-Z_]+", (PACKAGE / "knobs.py").read_text()))
    page = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text()
    assert set(re.findall(r"`(SHARDCKPT_[A-Z_]+)`", page)) == named
