"""The rules of the house: the public names, import layers, sizes of files and functions."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import shardckpt
from shardckpt.config import Options

PACKAGE = Path(shardckpt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    {"errors", "torch_compat", "_version"},
    {"config", "logs", "reports"},
    {"format", "io"},
    {"state"},
    {"transforms"},
    {"plan"},
    {"storage", "coordination"},
    {"loading"},
    {"saving"},
    {"maintenance"},
    {"checkpoint"},
    {"dcp"},
    {"api"},
    {"convert", "testing"},
    {"analysis", "manager"},
    {"nn_handler"},
    {"integrations"},
    {"cli"},
    {"shardckpt", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(path: Path, package: Path = PACKAGE) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(sources: dict[str, str], packages: frozenset[str] = frozenset()) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports: at any depth, whatever the form, for
    type checking too."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        names: list[str] = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                package = module if packages and module in packages else module.rpartition(".")[0]
                base = importlib.util.resolve_name(base, package) if node.level else base
                whole = [f"{base}.{alias.name}" for alias in node.names]
                names += [name if name in sources else base for name in whole]
        found[module] = {name for name in names if name in sources and name != module}
    return found


def circles(found: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or not."""

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            new = found[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reached(module) for module in found}
    together = {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in found
        if module in reach[module]
    }
    return sorted(sorted(circle) for circle in together)


def folder(module: str) -> str:
    """The folder in the layers. integrations/dcp stands apart: `save` uses its planners."""
    parts = module.split(".")
    if parts[1:3] == ["integrations", "dcp"]:
        return "dcp"
    return parts[1] if len(parts) > 1 else parts[0]


def upward_imports(found: dict[str, set[str]]) -> list[str]:
    """Imports of another folder that is not below the own one."""
    return [
        f"{module} imports {name}"
        for module, names in found.items()
        for name in sorted(names)
        if folder(name) != folder(module) and LEVEL[folder(name)] >= LEVEL[folder(module)]
    ]


SOURCES = {module_name(path): path.read_text() for path in FILES}
PACKAGES = frozenset(module_name(path) for path in FILES if path.name == "__init__.py")


def test_no_import_runs_upwards():
    assert upward_imports(imports(SOURCES, PACKAGES)) == []


def test_no_modules_import_each_other():
    assert circles(imports(SOURCES, PACKAGES)) == []


def test_every_folder_has_its_layer():
    assert {folder(module) for module in SOURCES} == set(LEVEL)


@pytest.mark.parametrize(
    "line",
    [
        "from shardckpt.api import save",
        "from shardckpt import api",
        "import shardckpt.api",
        "from .. import api",
        "from ..api import save",
        "def f():\n    import shardckpt.api as a",
        "if TYPE_CHECKING:\n    from shardckpt.api import save",
        "import shardckpt",
    ],
)
def test_every_form_of_an_upward_import_would_be_seen(line):
    sources = {"shardckpt": "", "shardckpt.api": "", "shardckpt.format.manifest": line}
    assert len(upward_imports(imports(sources))) == 1


def test_a_circle_would_be_seen():
    sources = {
        "shardckpt.a": "from shardckpt.b import x",
        "shardckpt.b": "def f():\n    import shardckpt.c",
        "shardckpt.c": "if TYPE_CHECKING:\n    from shardckpt import a",
        "shardckpt.d": "import shardckpt.a",
    }
    sources["shardckpt"] = ""
    assert circles(imports(sources)) == [["shardckpt.a", "shardckpt.b", "shardckpt.c"]]


def _code_begins(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    return (first.end_lineno or 0) + 1 if ast.get_docstring(function) else function.lineno


def long_functions(source: str, *, lines: int) -> list[str]:
    """Functions of more lines than that, without their docstrings."""
    return [
        f"{node.name}: {size}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (size := (node.end_lineno or 0) - _code_begins(node) + 1) > lines
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_function_fits_on_a_screen(path):
    assert not long_functions(path.read_text(), lines=80)


def test_a_long_function_would_be_seen():
    assert long_functions("def f():\n" + "    x = 1\n" * 99, lines=80) == ["f: 100"]


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
            name = re.split(r"[\[<>=~! ]", requirement)[0].replace("-", "_")
            found.add(name.removesuffix("_api"))  # opentelemetry-api is imported as opentelemetry
    return found


def untyped() -> set[str]:
    """The packages whose imports mypy skips, whether they are installed or not."""
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    skipped = [name for name in settings.sections() if name.startswith("mypy-")]
    return {
        package.strip().removesuffix(".*")
        for name in skipped
        if settings[name].get("follow_imports") == "skip"
        for package in name.removeprefix("mypy-").split(",")
    }


def test_scripts_check_installs_all_that_is_imported():
    """mypy reads every import. A package in another extra would be missing in a fresh clone."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    check = project["optional-dependencies"]["check"]
    brought = distributions(project, project["dependencies"] + check)
    imported = set().union(*(outside_imports(path.read_text()) for path in FILES))
    assert imported - untyped() <= brought
    assert untyped() <= imported
    assert "rich" in imported
    assert "rich" not in distributions(project, project["dependencies"] + ["mypy>=1"])


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_import_is_light():
    """`import shardckpt` imports no other package: not torch, not numpy, and no extra."""
    code = "import sys; before = set(sys.modules); import shardckpt; "
    loaded = run(code + "print(*(set(sys.modules) - before))").split()
    assert {name.split(".")[0] for name in loaded} <= {"shardckpt", *sys.stdlib_module_names}


def test_extras_are_optional(tmp_path):
    """Saving and loading work without extras, and the command names the extra that it needs."""
    code = f"""
import sys
for name in ("click", "rich", "mpi4py", "sklearn", "mkdocs", "hypothesis", "pytest"):
    sys.modules[name] = None
import torch, shardckpt
from shardckpt.cli.entry import main
shardckpt.save({{"a": torch.ones(3)}}, {str(tmp_path / "c")!r})
print(shardckpt.load_state({str(tmp_path / "c")!r})["a"].tolist())
assert main() == 9
import shardckpt.nn_handler, shardckpt.integrations.dcp
"""
    assert run(code).startswith("[1.0, 1.0, 1.0]")


def test_every_option_is_documented():
    """Each environment variable of an option stands on the page of options, and no other."""
    names = {f"SHARDCKPT_{option.name.upper()}" for option in dataclasses.fields(Options)}
    page = (PACKAGE.parent / "docs" / "options.md").read_text()
    assert set(re.findall(r"`(SHARDCKPT_[A-Z_]+)`", page)) == names


def test_files_that_harnesses_and_pages_name_are_there():
    """A harness that runs a test that has moved takes its failure for a success."""
    root = PACKAGE.parent
    texts = [*(root / "scripts").iterdir(), *(root / "docs").glob("*.md"), *root.glob("*.md")]
    texts += [root / "tests/faults/mutate.py"]
    named = {
        (path.name, name)
        for path in texts
        if path.is_file() and path.name != "CHANGELOG.md"
        for name in re.findall(r"\b(?:tests|shardckpt)/[\w/]+\.py\b", path.read_text())
    }
    assert ("mutate.py", "tests/storage/test_deletion.py") in named
    assert not {(page, name) for page, name in named if not (root / name).exists()}


FACTORIES = {"arange", "asarray", "empty", "full", "ones", "randperm", "tensor", "zeros"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_new_tensors_name_their_device(path):
    """torch.set_default_device() of a program must not move what shardckpt makes."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                named = any(keyword.arg in ("device", None) for keyword in node.keywords)
                assert name not in FACTORIES or named, f"torch.{name} in line {node.lineno}"


WITHOUT_TEST_FILE = {"__main__.py": "a call of cli/entry", "_version.py": "a declaration"}
"""Modules without a test file of their name, and why."""


def modules_without_test_file(package: Path, tests: Path) -> set[str]:
    """The modules that have no test file of their name in the folder of the tests."""
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    return {
        str(path)
        for path in modules
        if path.name != "__init__.py" and not (tests / path.parent / f"test_{path.name}").exists()
    }


def test_every_module_has_a_test_file_of_its_name():
    tests = PACKAGE.parent / "tests"
    assert modules_without_test_file(PACKAGE, tests) == WITHOUT_TEST_FILE.keys()


def test_a_module_without_a_test_file_would_be_seen(tmp_path):
    for name in ("a/__init__.py", "a/b.py", "a/c.py", "tests/a/test_b.py", "tests/test_c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert modules_without_test_file(tmp_path / "a", tmp_path / "tests" / "a") == {"c.py"}


DEFINED_TWICE = {
    "COMMANDS": "each module of the command lists its own",
    "Trainer": "transformers' own word, and the one of nn_handler",
    "load_state": "accelerate's own word",
    "main": "cli/entry calls cli/main",
    "open_url": "storage/resolve calls it in the module of the scheme",
    "rescue": "api is the public face of maintenance",
    "reshard": "api is the public face of maintenance",
}
"""Names without an underscore that several modules define, and why."""


def defined_names(source: str) -> set[str]:
    """The names without an underscore that a module defines, apart from type variables."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.Assign(value=ast.Call(func=ast.Name(id="TypeVar"))):
                pass
            case ast.Assign(targets=targets):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def defined_twice(sources: dict[str, str]) -> set[str]:
    counts = Counter(name for source in sources.values() for name in defined_names(source))
    return {name for name, count in counts.items() if count > 1}


def test_a_name_is_defined_in_one_module():
    """One word means one thing."""
    assert defined_twice(SOURCES) == DEFINED_TWICE.keys()


def test_a_name_of_two_modules_would_be_seen():
    sources = {
        "a": "def f(): pass\nclass C: pass\nX = 1\nT = TypeVar('T')\n_Y = 1\nfrom d import Z",
        "b": "async def f():\n    g = 1\nT = TypeVar('T')\n_Y = 1\nfrom d import Z",
        "c": "C: TypeAlias = int\nX = Z = 3\ndef g(): pass",
    }
    assert defined_twice(sources) == {"f", "C", "X"}


def test_one_module_alone_calls_a_kind_of_accelerator_by_its_name():
    """The names of types in examples and messages are not calls."""
    calls = re.compile(r"torch\.(cuda|xpu|mps)\b|\.is_cuda\b|\.cuda\(")
    found = {str(path.relative_to(PACKAGE)) for path in FILES if calls.search(path.read_text())}
    assert found == {"io/devices.py"}
