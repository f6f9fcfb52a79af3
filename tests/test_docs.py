"""The documentation names what is there."""

from __future__ import annotations

import json
import logging
import re
import runpy
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
import torch.distributed.tensor
from torch.distributed.checkpoint import format_utils, state_dict, state_dict_loader

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "CHANGELOG.md", ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def dead_links(text: str, folder: Path) -> list[str]:
    """Relative links of a page that lead to no file."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    local = [target for target in targets if not target.startswith(("http:", "https:", "#"))]
    return [target for target in local if not (folder / target.split("#")[0]).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead_links(page.read_text(), page.parent) == []


def test_a_dead_link_would_be_seen(tmp_path):
    assert dead_links("see [this](nowhere.md#part) and [that](https://x.y)", tmp_path) == [
        "nowhere.md#part"
    ]


def test_the_reference_holds_every_public_name():
    text = "".join((ROOT / "docs" / page).read_text() for page in ("api.md", "errors.md"))
    described = re.findall(r"^::: shardckpt(?:\.\w+)*?\.(\w+)$", text, re.MULTILINE)
    assert set(shardckpt.__all__) - set(described) == {"__version__"}
    assert len(described) == len(set(described))


def modules_of_the_tree(page: str) -> list[str]:
    """The modules in the tree of a page, as paths below the package."""
    tree = page.split("```text\nshardckpt/\n")[1].split("```")[0]
    found, folder = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            found.append(name if not line.startswith("    ") else folder + name)
    return found


def modules_of_the_package() -> list[str]:
    package = Path(shardckpt.__file__).parent
    found = [str(path.relative_to(package)) for path in package.rglob("*.py")]
    return sorted(name for name in found if not name.endswith("/__init__.py"))


def test_the_architecture_page_has_every_module_once():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert sorted(modules_of_the_tree(page)) == modules_of_the_package()


def test_the_diagram_has_every_module_once():
    made = runpy.run_path(str(ROOT / "scripts" / "module_diagram.py"))["drawing"]()
    assert made == (ROOT / "docs" / "assets" / "modules.svg").read_text()
    drawn = re.findall(r'<text x="\d+" y="\d+">([^<]+)</text>', made)
    state = ["tensors", "modules", "optimizers", "values"]
    expected = [*(Path(name).stem for name in modules_of_the_package()), *state, *state]
    pipelines = ["pipeline"] * 2  # in the titles
    assert sorted([*(name.split("/")[-1] for name in drawn), *pipelines]) == sorted(expected)


def test_every_module_that_the_architecture_page_names_exists():
    page = (ROOT / "docs" / "architecture.md").read_text().split("## The tree")[0]
    rows = [line.rsplit("|", 2)[1] for line in page.splitlines() if line.startswith("|")]
    named = set(re.findall(r"`(\w+(?:/\w+)*)`", "".join(rows)))
    assert len(named) > 20
    assert {f"{name}.py" for name in named} <= set(modules_of_the_package())


def test_the_contributing_page_names_every_command():
    scripts = [path.name for path in (ROOT / "scripts").iterdir() if path.is_file()]
    commands = {name for name in scripts if "." not in name}
    page = (ROOT / "docs" / "contributing.md").read_text()
    assert set(re.findall(r"`scripts/(\w+)[` ]", page)) == commands


def test_a_missing_module_would_be_seen():
    page = "```text\nshardckpt/\n  api.py   calls\n  io/   memory\n    buffers.py  buffers\n```"
    assert modules_of_the_tree(page) == ["api.py", "io/buffers.py"]


def figures(page: str) -> dict[str, dict[str, str]]:
    """Case -> column -> figure, of the table that begins with `| case |`."""
    table = page.split("| case |", 1)[1].split("\n\n")[0]
    header, _, *rows = [line.strip("|").split("|") for line in f"| case |{table}".splitlines()]
    columns = [cell.strip() for cell in header[1:]]
    return {
        row[0].strip(): dict(zip(columns, (cell.strip() for cell in row[1:]), strict=False))
        for row in rows
    }


def test_the_figures_for_users_are_those_of_the_scoreboard():
    mine = figures((ROOT / "docs" / "performance.md").read_text())
    board = figures((ROOT / "docs" / "scoreboard.md").read_text())
    assert len(mine) > 5
    for case, row in mine.items():
        assert row == {column: board[case][column] for column in row}, case


COMMANDS = [
    "inspect",
    "verify",
    "rescue",
    "reshard",
    "convert",
    "extract",
    "diff",
    "stats, cat",
    "merge",
    "report",
    "ls, du",
    "cp",
    "rm, prune",
]


@pytest.mark.parametrize("commands", COMMANDS)
def test_the_command_line_page_has_every_option(commands, capsys):
    page = (ROOT / "docs" / "cli.md").read_text()
    section = page.split(f"\n## {commands}\n")[1].split("\n## ")[0]
    rows = "".join(re.findall(r"^\| `--.*", section, re.MULTILINE))
    for command in commands.split(", "):
        assert main([command, "--help"]) == 0
    offered = set(re.findall(r"(--[a-z][a-z-]+)", capsys.readouterr().out)) - {"--help"}
    assert set(re.findall(r"`(--[a-z-]+)", rows)) == offered


def test_the_command_line_page_has_every_command(capsys):
    main(["--help"])
    listed = capsys.readouterr().out.split("Commands:\n")[1]
    names = re.findall(r"^  ([a-z]+) ", listed, re.MULTILINE)
    assert sorted(names) == sorted(", ".join(COMMANDS).split(", "))


DCP = (dcp, format_utils, state_dict, state_dict_loader)


def unknown_calls(page: str, source: str) -> list[str]:
    """Functions in the prose of a page that the package, torch, json and logging lack."""
    prose = re.sub(r"^( *)```.*?^\1```", "", page, flags=re.MULTILINE | re.DOTALL)
    names = [name.split(".")[-1] for name in re.findall(r"`([\w.]+)\(", prose)]
    ours = set(re.findall(r"(?:def|class) (\w+)", source))
    theirs = [
        dir(space)
        for space in (
            torch.Tensor,
            torch.distributed,
            torch.distributed.tensor,
            *DCP,
            json,
            logging,
        )
    ]
    return sorted(set(names) - ours - set().union(*theirs))


SOURCE = "".join(path.read_text() for path in (ROOT / "shardckpt").rglob("*.py"))


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_function_that_a_page_names_exists(page):
    assert unknown_calls(page.read_text(), SOURCE) == []


def test_an_unknown_function_would_be_seen():
    assert unknown_calls("Call `handle.staged()`, then `load()`.", SOURCE) == ["staged"]


def test_the_errors_page_has_the_complete_tree():
    page = (ROOT / "docs" / "errors.md").read_text().split("```")[1]
    assert set(re.findall(r"\w+Error(?= |$)", page, re.MULTILINE)) >= set(errors.__all__)


def test_the_command_line_page_has_every_exit_code():
    page = (ROOT / "docs" / "cli.md").read_text()
    for name in errors.__all__:
        error = getattr(errors, name)
        if "exit_code" in vars(error) and name != "ShardckptError":
            assert f"| {error.exit_code} | `{name}` |" in page
