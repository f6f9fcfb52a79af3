"""The growth of planning with ranks and tensors, as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and bytes over the number of ranks, for the number of tensors that most have."""
    tensors = statistics.mode(result["world"]["tensors"] for result in results)
    results = [result for result in results if result["world"]["tensors"] == tensors]
    results.sort(key=lambda result: result["world"]["ranks"])
    ranks = [result["world"]["ranks"] for result in results]
    matplotlib.rcParams.update({"svg.hashsalt": "shardckpt", "font.size": 9})
    figure, (seconds, volume) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines = {
        "first save: divide": [decided(r, "first save", "divide") for r in results],
        "first save: manifest": [decided(r, "first save", "write") for r in results],
        "repeated save: all": [
            decided(r, "repeated save", "plan") + decided(r, "repeated save", "write")
            for r in results
        ],
        "load: manifest (every rank)": [loaded(r, "manifest") for r in results],
        "load: match and reads (every rank)": [
            loaded(r, "match") + loaded(r, "reads") for r in results
        ],
    }
    for name, values in lines.items():
        seconds.plot(ranks, values, marker="o", markersize=3, label=name)
    seconds.set_ylabel("seconds of processor time")
    bytes_of = {
        "first save: to rank 0": [moved(r, "first save", "received_bytes") for r in results],
        "first save: from rank 0": [moved(r, "first save", "sent_bytes") for r in results],
        "repeated save: to rank 0": [moved(r, "repeated save", "received_bytes") for r in results],
        "manifest": [result["manifest_bytes"] for result in results],
    }
    for name, values in bytes_of.items():
        volume.plot(ranks, values, marker="o", markersize=3, label=name)
    volume.set_ylabel("bytes")
    for axes in (seconds, volume):
        axes.set(xscale="log", yscale="log", xlabel=f"ranks, with {tensors:,} tensors")
        axes.set_xticks(ranks, [f"{number:,}" for number in ranks], rotation=30)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def decided(result: dict[str, Any], save: str, phase: str) -> float:
    """Seconds of rank 0 in a phase."""
    phases = result["saves"][save]["rank 0"]
    return sum(found["decide_s"] for found in phases if found["name"] == phase)


def loaded(result: dict[str, Any], phase: str) -> float:
    """Seconds of an ordinary rank in a phase of a load."""
    seconds: float = result["loads"]["ordinary rank"][phase]
    return seconds


def moved(result: dict[str, Any], save: str, way: str) -> int:
    """Bytes of rank 0 in all phases."""
    return sum(found[way] for found in result["saves"][save]["rank 0"])
