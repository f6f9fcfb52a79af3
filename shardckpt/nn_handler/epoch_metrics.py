"""Loss and metrics of an epoch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from shardckpt.errors import StateError
from shardckpt.nn_handler.batch import Result
from shardckpt.nn_handler.parallel import mean_over_ranks
from shardckpt.nn_handler.training_state import TrainingState

__all__ = ["EpochSums", "accumulates"]


def accumulates(metric: Any) -> bool:
    """Whether a metric is an object that takes in batches and computes at the end, as those of
    torchmetrics are."""
    return not isinstance(metric, type) and all(
        callable(getattr(metric, name, None)) for name in ("update", "compute", "reset")
    )


class EpochSums:
    """Loss, terms and metrics over this rank's samples of an epoch, each with its own count.

    Sums stay on the device until they are asked for. Objects with update, compute and reset
    take in the batches by themselves; for validation they are copied.
    """

    def __init__(self, handler: TrainingState, *, validation: bool = False) -> None:
        self.handler = handler
        self.sums: dict[str, Any] = {"loss": 0.0}
        self.counts: dict[str, int] = {"loss": 0}
        own: dict[str, Any] = {n: m for n, m in handler.metrics.items() if accumulates(m)}
        self.objects = copy.deepcopy(own) if validation else own
        for metric in self.objects.values():
            metric.reset()
            if callable(getattr(metric, "to", None)):
                metric.to(handler.device)

    @torch.no_grad()
    def add(self, result: Result) -> None:
        """Take in a batch."""
        self._add("loss", result.loss.detach(), result.size)
        for name, value in result.terms.items():
            self._add(name, value, result.size)
        if result.outputs is None:
            return
        for name, metric in self.handler.metrics.items():
            if name in self.objects:
                self.objects[name].update(result.outputs, result.targets)
            else:
                self._add(name, metric(result.outputs, result.targets), result.size)

    def log(self, name: str, value: Any) -> None:
        """Take in a value that the user logs."""
        self._add(name, value, 1)

    def _add(self, name: str, value: Any, size: int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + _number(value, name) * size
        self.counts[name] = self.counts.get(name, 0) + size

    def means(self) -> dict[str, float]:
        """Over all ranks' samples; collective."""
        found = {n: (float(value), float(self.counts[n])) for n, value in self.sums.items()}
        means = mean_over_ranks(found)
        for name, metric in self.objects.items():
            means[name] = float(_number(metric.compute(), name))
        first = ["loss", *self.handler.metrics]
        return {name: means[name] for name in (*first, *means) if name in means}

    def state(self) -> dict[str, Any]:
        """What `plain_sums` makes plain data of, when it is saved."""
        states = {name: _state_of(metric) for name, metric in self.objects.items()}
        return {"sums": dict(self.sums), "counts": dict(self.counts), "metrics": states}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what state returned."""
        counts = state.get("counts") or dict.fromkeys(state["sums"], state.get("count", 0))
        self.sums.update(state["sums"])
        self.counts.update({name: counts.get(name, 0) for name in state["sums"]})
        for name, metric in self.objects.items():
            for key, value in (state.get("metrics") or {}).get(name, {}).items():
                if key in _state_of(metric):
                    setattr(metric, key, copy.deepcopy(value))


def _state_of(metric: Any) -> dict[str, Any]:
    """The states of an object of torchmetrics; other objects have none that is known."""
    defaults = getattr(metric, "_defaults", {})
    return {name: copy.deepcopy(getattr(metric, name)) for name in defaults}


def _number(value: Any, name: str) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        wide = value.detach().reshape(())
        return wide if wide.device.type == "mps" else wide.double()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StateError(
            f"The metric {name!r} gave no number",
            expected="a number, or a tensor with one element",
            actual=f"{type(value).__name__}: {error}",
        ) from error
