"""All rows as a picture: each figure as a multiple of shardckpt's."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

from benchmarks.rounds import RAW
from benchmarks.table import OWN, Row

matplotlib.use("svg")
from matplotlib import pyplot

_MARKS = "ovs^DPX*"


def plot(rows: Sequence[Row], path: str) -> None:
    """One line for each measurement, one mark for each library; right of 1 is slower."""
    rows = [row for row in rows if row.figures.get(OWN)]
    names = list(dict.fromkeys(name for row in rows for name in row.figures if name != OWN))
    matplotlib.rcParams.update({"svg.hashsalt": "shardckpt", "font.size": 9})
    size = (9, 1.5 + 0.35 * len(rows))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.axvline(1, color="black", label=OWN)
    for number, name in enumerate(names):
        found = [
            (row.figures[name] / row.figures[OWN], y)
            for y, row in enumerate(rows)
            if row.figures.get(name)
        ]
        mark = "|" if name == RAW else _MARKS[number % len(_MARKS)]
        axes.plot(*zip(*found, strict=True), mark, markersize=12 if name == RAW else 6, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("multiple of shardckpt's figure; less is better")
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, metadata={"Date": None})
