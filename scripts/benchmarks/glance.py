"""docs/performance.svg: the table of docs/performance.md as bars.

PYTHONPATH=scripts python -m benchmarks.glance docs/performance.md docs/performance.svg
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

_COLOURS = {
    "shardckpt": "#3949ab",
    "DCP": "#f4a259",
    "torch_checkpointing": "#8cb369",
    "safetensors": "#b0bec5",
}


def rows_of(page: str) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """The libraries and the rows in seconds of the page's table; None where a cell is empty."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = []
    for title, *cells in body:
        if title.endswith(" (s)"):
            name = re.sub(r" \(.*", "", title)
            rows.append((name, [float(c) if c else None for c in cells]))
    return header[1:], rows


def glance(page: str, picture: str) -> None:
    """Draw one group of bars a row: seconds of each library, less is better."""
    table = re.search(r"^\| case \|.*?(?=\n\n)", Path(page).read_text(), re.DOTALL | re.MULTILINE)
    if table is None:
        raise SystemExit(f"{page} has no table that begins with | case |")
    libraries, rows = rows_of(table[0])
    matplotlib.rcParams.update({"svg.hashsalt": "shardckpt", "font.size": 10})
    figure, axes = pyplot.subplots(figsize=(8.5, 0.6 + 0.62 * len(rows)), layout="constrained")
    _bars(axes, libraries, rows)
    axes.set_yticks(range(len(rows)), [title for title, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds; less is better")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(picture, metadata={"Date": None})


def _bars(
    axes: pyplot.Axes, libraries: Sequence[str], rows: Sequence[tuple[str, list[float | None]]]
) -> None:
    height = 0.8 / len(libraries)
    for place, name in enumerate(libraries):
        found = [(y, cells[place]) for y, (_, cells) in enumerate(rows) if cells[place]]
        at = [y + (place - (len(libraries) - 1) / 2) * height for y, _ in found]
        bars = axes.barh(at, [value for _, value in found], height, label=name)
        for bar in bars:
            bar.set_color(_COLOURS.get(name, "#eceff1"))
        if place == 0:
            axes.bar_label(bars, fmt="%.2f s", padding=3, fontsize=8)


if __name__ == "__main__":
    glance(*sys.argv[1:])
