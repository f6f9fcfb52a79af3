"""The code on a page of the documentation, as a script that runs it.

Blocks run in the order of the page. Blocks of Python share their names. A block with a title is
written to a file of that name instead. Blocks of sh run with `bash -e`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(r"^( *)```(\S*)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, the file that it is, its code, its line in the page, and the
    numbers of its highlighted lines."""

    language: str
    title: str | None
    code: str
    line: int
    highlighted: tuple[int, ...]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    for match in _FENCE.finditer(page):
        indent, language, options, code = match.groups()
        title = re.search(r'title="([^"]+)"', options)
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        number = page.count("\n", 0, match.start()) + 1
        marks = re.search(r'hl_lines="([^"]+)"', options)
        highlighted = tuple(map(int, marks[1].split())) if marks else ()
        code = "\n".join(lines) + "\n"
        found.append(Block(language, title[1] if title else None, code, number, highlighted))
    return found


def unfenced(page: str) -> list[str]:
    """Lines of indented code blocks: four spaces after an empty line, outside of lists."""
    lines = re.sub(r"^::: .*\n( +.*\n)*", "", _FENCE.sub("", page), flags=re.MULTILINE).splitlines()
    found, before, in_list = [], "", False
    for line in lines:
        if re.match(r"\s*([-*]|\d+\.) ", line):
            in_list = True
        elif line and not line.startswith(" "):
            in_list = False
        if not in_list and line.startswith("    ") and (not before or before.startswith("    ")):
            found.append(line)
        before = line
    return found


def script(page: str) -> str:
    """The code of a page as one script, which runs the blocks in order."""
    parts = ["import pathlib as _pathlib, subprocess as _subprocess\n"]
    for block in blocks(page):
        parts.append(f"# line {block.line} of the page\n")
        if block.language == "sh":
            command = ["bash", "-e", "-c", block.code]
            parts.append(f"_subprocess.run({command!r}, check=True)\n")
        elif block.language == "python" and block.title:
            parts.append(f"_pathlib.Path({block.title!r}).write_text({block.code!r})\n")
        elif block.language == "python":
            parts.append(block.code)
    return "\n".join(parts)
