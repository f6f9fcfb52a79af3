"""The documentation names what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shardckpt

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


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
    text = (ROOT / "docs" / "api.md").read_text()
    described = set(re.findall(r"^::: shardckpt\.(\w+)$", text, re.MULTILINE))
    # the base of all errors stands with the others, in shardckpt.errors
    assert set(shardckpt.__all__) - described == {"__version__", "ShardckptError"}
    assert "::: shardckpt.errors" in text
