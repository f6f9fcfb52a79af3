"""Plots of the history."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from shardckpt.errors import DependencyError, StateError
from shardckpt.storage.posix import translated

__all__ = ["plot"]


def plot(
    history: Mapping[str, Sequence[float]],
    epochs: Mapping[str, Sequence[int]],
    names: Sequence[str] | None,
    path: str | None,
) -> Any:
    """Plot metrics by epoch, each with its validation; see NNHandler.plot_history."""
    try:
        # pyplot is what makes a notebook show figures
        module = "matplotlib.pyplot" if "ipykernel" in sys.modules else "matplotlib.figure"
        importlib.import_module(module)
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise DependencyError(
            "Plots need an extra that is not installed", remedy='pip install "shardckpt[plot]"'
        ) from error
    names = [names] if isinstance(names, str) else names
    wanted = names or list(dict.fromkeys(name.removeprefix("val_") for name in history))
    unknown = [n for n in wanted if n not in history and f"val_{n}" not in history]
    if unknown or not wanted:
        raise StateError(
            "The history has nothing to plot" if not wanted else "The history has no such metric",
            expected=", ".join(history) or "a history: call train first",
            actual=", ".join(unknown) or None,
        )
    figure = figure_class(figsize=(4 * len(wanted), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True):
        for metric, label in ((name, "training"), (f"val_{name}", "validation")):
            if metric in history:
                axis.plot(epochs[metric], history[metric], marker=".", label=label)
        axis.set(title=name, xlabel="epoch")
        axis.legend()
    if path is not None:
        with translated(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            try:
                figure.savefig(path)
            except ValueError as error:
                raise StateError(
                    "matplotlib does not write this format",
                    path=path,
                    expected="a suffix such as .png, .svg or .pdf",
                    actual=str(error),
                ) from error
    return figure
