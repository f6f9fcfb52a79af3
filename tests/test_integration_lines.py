"""The examples of the integrations differ in at most three lines from the program without them."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

from tests.docs_code import Block, blocks

PAGES = Path(__file__).parent.parent / "docs" / "how-to"
LIMIT = 3
WITHOUT = {
    "Lightning, a strategy": ["", 'strategy="ddp",'],
    "Lightning, a callback": ["", ""],
    "transformers, a sharded model": ["", "", "model.save_pretrained(target)"],
    "transformers, the Trainer": ["from transformers import Trainer", "trainer.train()"],
    "PEFT, an adapter": [
        "",
        'adapted.save_pretrained("adapter")',
        'adapted.load_adapter("adapter", "default")',
    ],
    "accelerate": ["", ""],
    "torchtitan": [
        "from torchtitan.components.checkpointer.dcp import CheckpointManager",
        "checkpoint = CheckpointManager.Config(enable=True, interval=500, keep_latest_k=2)",
    ],
    "torchft": ["", "", ""],
    "torchdata, in a program that saves with shardckpt": ["", 'state = {"epoch": 0}'],
}
"""The highlighted lines of each example as they are without the integration, "" for no line."""


def examples(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text()) if block.highlighted]


def listed() -> dict[str, tuple[Block, int]]:
    """The rows of the table: the example on the page, and the number of lines in the table."""
    rows = re.findall(
        r"^\| \[(\w+)\]\((\w+\.md)\)(.*?) \| (\d+) \|",
        (PAGES / "frameworks.md").read_text(),
        re.MULTILINE,
    )
    found, seen = {}, {}
    for library, page, use, lines in rows:
        number = seen[page] = seen.get(page, -1) + 1
        found[library + use] = (examples(PAGES / page)[number], int(lines))
    return found


def without(block: Block, lines: list[str]) -> str:
    """The program of a block, with other lines in place of the highlighted ones."""
    code = block.code.splitlines()
    for number, line in zip(block.highlighted, lines, strict=True):
        before = code[number - 1]
        code[number - 1] = before[: len(before) - len(before.lstrip())] + line if line else ""
    return "\n".join(code) + "\n"


def undefined(code: str) -> set[str]:
    """The names that a program uses and does not define."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    defined = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
    return {name.id for name in names} - defined - set(dir(builtins))


@pytest.mark.parametrize("name", WITHOUT)
def test_an_example_needs_at_most_three_lines(name):
    block, lines = listed()[name]
    assert lines == len(block.highlighted) <= LIMIT
    program = without(block, WITHOUT[name])
    assert "shardckpt.integrations" not in program
    assert undefined(program) <= undefined(block.code)
    if not name.startswith("torchdata"):
        assert "shardckpt" not in program


def test_every_example_of_an_integration_is_in_the_table():
    assert list(listed()) == list(WITHOUT)
    pages = {page for page in PAGES.glob("*.md") for _ in examples(page)}
    assert sum(len(examples(page)) for page in pages) == len(WITHOUT)


@pytest.mark.parametrize(
    ("marks", "without_it", "seen"),
    [
        ("1 2", ["", ""], {"checkpoints"}),  # line 3 needs shardckpt too
        ("1 3", ["", ""], {"resume"}),
        ("1 2 3", ["", "", ""], set()),
    ],
)
def test_a_line_that_is_not_highlighted_would_be_seen(marks, without_it, seen):
    code = "from shardckpt.integrations.torchft import resume\nx = resume()\nx.save()\n"
    code = code.replace("x", "checkpoints")
    [block] = blocks(f'```python hl_lines="{marks}"\n{code}```\n')
    assert undefined(without(block, without_it)) == seen
