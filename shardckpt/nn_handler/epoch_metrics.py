"""Loss and metrics of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from shardckpt.errors import StateError
from shardckpt.nn_handler.parallel import mean_over_ranks

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = ["EpochSums"]


class EpochSums:
    """Loss and metrics, summed over this rank's samples of an epoch."""

    def __init__(self, handler: NNHandler) -> None:
        self.handler = handler
        self.sums = dict.fromkeys(["loss", *handler.metrics], 0.0)
        self.count = 0

    def add(self, loss: torch.Tensor, outputs: Any, targets: Any) -> None:
        """Take in a batch."""
        size = _batch_size(targets)
        self.count += size
        self.sums["loss"] += float(loss.detach()) * size
        with torch.no_grad():
            for name, metric in self.handler.metrics.items():
                self.sums[name] += _number(metric(outputs, targets), name) * size

    def means(self) -> dict[str, float]:
        """Over all ranks' samples; collective."""
        return mean_over_ranks(self.sums, self.count, self.handler.device)

    def state(self) -> dict[str, Any]:
        """Plain data, for load."""
        return {"count": self.count, "sums": dict(self.sums)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what state returned."""
        self.count = state["count"]
        self.sums.update({k: v for k, v in state["sums"].items() if k in self.sums})


def _batch_size(targets: Any) -> int:
    """Of a tensor, of collated containers of tensors, or of a list with an item a sample."""
    if isinstance(targets, torch.Tensor):
        return len(targets) if targets.dim() else 1
    items = list(targets.values()) if isinstance(targets, Mapping) else targets
    sizes = {len(i) for i in items if isinstance(i, torch.Tensor) and i.dim()}
    return sizes.pop() if len(sizes) == 1 else len(items)


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StateError(
            f"The metric {name!r} gave no number",
            expected="a number, or a tensor with one element",
            actual=f"{type(value).__name__}: {error}",
        ) from error
