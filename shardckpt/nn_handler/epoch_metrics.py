"""The loss and the metrics of an epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shardckpt.errors import StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.batch import Result, concatenated_batches, kept_outputs
from shardckpt.nn_handler.parallel import Layout, gathered, mean_over_ranks
from shardckpt.nn_handler.training_state import TrainingState, check_metric_name

__all__ = ["EpochSums", "accumulates"]


def accumulates(metric: Any) -> bool:
    """Whether a metric has update, compute and reset, as those of torchmetrics have."""
    return not isinstance(metric, type) and all(
        callable(getattr(metric, name, None)) for name in ("update", "compute", "reset")
    )


class WholeEpoch:
    """A function of all outputs and targets of an epoch, in the form of an object."""

    sync = True  # `compute` gathers from all ranks

    def __init__(self, function: Callable[[Any, Any], Any], layout: Layout) -> None:
        self.function, self.layout = function, layout
        self.reset()

    def reset(self) -> None:
        """Start an epoch. The lists of the previous one may be part of a state that is saved."""
        self.outputs: list[Any] = []
        self.targets: list[Any] = []

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        self.outputs.append(kept_outputs(outputs))
        self.targets.append(kept_outputs(targets))

    def compute(self) -> Any:
        """Return the value over the batches of all ranks. Collective."""
        own = (
            (concatenated_batches(self.outputs), concatenated_batches(self.targets))
            if self.outputs
            else None
        )
        there = [part for part in gathered(own, self.layout) if part is not None]
        if not there:
            return float("nan")
        return self.function(*(concatenated_batches([part[at] for part in there]) for at in (0, 1)))

    def state(self) -> _Batches:
        """Return the batches so far."""
        return _Batches(self.outputs, self.targets, len(self.outputs))

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.reset()
        if "outputs" in state and "targets" in state:
            self.update(state["outputs"], state["targets"])


class _Batches:
    """The first batches of lists that grow. It copies nothing, as most steps are followed by no
    save."""

    def __init__(self, outputs: list[Any], targets: list[Any], count: int) -> None:
        self.outputs, self.targets, self.count = outputs, targets, count

    def plain(self) -> dict[str, Any]:
        """Return the form that a checkpoint holds."""
        if not self.count:
            return {}
        return {
            "outputs": _plain(concatenated_batches(self.outputs[: self.count])),
            "targets": _plain(concatenated_batches(self.targets[: self.count])),
        }


def _plain(value: Any) -> Any:
    """Return a nested value with the dicts, tuples and lists of Python as its containers."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    return value


class EpochSums:
    """Loss, terms and metrics over this rank's samples of an epoch, each with its own count.

    Sums stay on the device until the end of the epoch. Metrics that are objects add batches by
    themselves; validation uses copies of them.
    """

    def __init__(self, handler: TrainingState, *, validation: bool = False) -> None:
        self.handler = handler
        self.sums: dict[str, Any] = {"loss": 0.0}
        self.counts: dict[str, int] = {"loss": 0}
        self.sources: dict[str, str] = {}
        own: dict[str, Any] = {n: m for n, m in handler.metrics.items() if accumulates(m)}
        self.objects = copy.deepcopy(own) if validation else own
        for metric in self.objects.values():
            metric.reset()
            if callable(getattr(metric, "to", None)):
                metric.to(handler.device)
        for name in handler.whole_epoch:
            self.objects[name] = WholeEpoch(handler.metrics[name], handler.layout)

    def add(self, result: Result) -> None:
        """Add a batch."""
        self._add("loss", result.loss, result.size)
        for name, value in result.terms.items():
            check_metric_name(name)
            self._claim(name, "a term of the loss")
            self._add(name, value, result.size)
        if self.handler.metrics and result.outputs is not None:
            self._add_metrics(result)
        else:
            self.warn_of_outputs()

    def warn_of_outputs(self) -> None:
        """Warn once if there are metrics, but the user's own step returned no outputs for them."""
        handler = self.handler
        if handler.metrics and handler.rank == 0 and "outputs" not in handler.warned:
            handler.warned.add("outputs")
            warn(
                f"The training step returned no outputs, so the metrics "
                f"{', '.join(handler.metrics)} are not computed. Return them beside the loss: "
                '{"loss": loss, "outputs": outputs, "targets": targets}. A step that calls '
                "handler.update logs its values with handler.log"
            )

    @torch.no_grad()
    def _add_metrics(self, result: Result) -> None:
        for name, metric in self.handler.metrics.items():
            if name in self.objects:
                self.objects[name].update(result.outputs, result.targets)
            else:
                self._add(name, metric(result.outputs, result.targets), result.size)

    def log(self, name: str, value: Any) -> None:
        """Add a value that the user logs."""
        self._claim(name, "a logged value")
        self._add(name, value, 1)

    def _claim(self, name: str, source: str) -> None:
        """Raise StateError if values of another source have this name."""
        first = "a metric" if name in self.handler.metrics else self.sources.get(name, source)
        self.sources[name] = first
        if first != source:
            raise StateError(
                "Two values have one name",
                actual=f"{name!r} is {first} and {source}",
                remedy="give one of them another name",
            )

    def _add(self, name: str, value: Any, size: int) -> None:
        self.sums[name] = _plus(self.sums.get(name, 0.0), _number(value, name), size)
        self.counts[name] = self.counts.get(name, 0) + size

    def means(self) -> dict[str, float]:
        """Return the means over the samples of all ranks. Collective."""
        found = {n: (float(value), float(self.counts[n])) for n, value in self.sums.items()}
        if not self.counts["loss"] and any(name.startswith("loss_") for name in found):
            del found["loss"]  # the step of the user updates other optimizers than the main one
        computed = {n: float(_number(m.compute(), n)) for n, m in self.objects.items()}
        synced = {n for n, metric in self.objects.items() if getattr(metric, "sync", None)}
        # an object that does not gather from all ranks by itself has a value for each rank
        found |= {n: (value, 1.0) for n, value in computed.items() if n not in synced}
        means = mean_over_ranks(found)
        means |= {n: value for n, value in computed.items() if n in synced}
        first = ["loss", *self.handler.metrics]
        return {name: means[name] for name in (*first, *means) if name in means}

    def state(self) -> dict[str, Any]:
        """Return the sums so far. TrainingState.state makes plain data of them."""
        states = {name: _state_of(metric) for name, metric in self.objects.items()}
        return {"sums": dict(self.sums), "counts": dict(self.counts), "metrics": states}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the plain form of a state."""
        counts = state.get("counts") or dict.fromkeys(state["sums"], state.get("count", 0))
        self.sums.update(state["sums"])
        self.counts.update({name: counts.get(name, 0) for name in state["sums"]})
        for name, metric in self.objects.items():
            saved = (state.get("metrics") or {}).get(name, {})
            if isinstance(metric, WholeEpoch):
                metric.load(saved.plain() if isinstance(saved, _Batches) else saved)
                continue
            for key, value in saved.items():
                if key in _state_of(metric):
                    setattr(metric, key, copy.deepcopy(value))


def _state_of(metric: Any) -> Any:
    """Return the state of a metric of torchmetrics. Empty for other objects."""
    if isinstance(metric, WholeEpoch):
        return metric.state()
    defaults = getattr(metric, "_defaults", {})
    return {name: _copied(getattr(metric, name)) for name in defaults}


def _copied(value: Any) -> Any:
    """Return a copy of one state. torchmetrics changes tensors in place, except those in lists."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else copy.deepcopy(value)


def _plus(total: Any, number: Any, size: int) -> Any:
    """total + size * number; in float64, and on the device of a number that is a tensor."""
    if not isinstance(number, torch.Tensor):
        return total + number * size
    if isinstance(total, torch.Tensor) and total.device == number.device:
        return torch.add(total, number, alpha=size)
    wide = number.dtype if number.device.type == "mps" else torch.float64
    total = torch.as_tensor(total, dtype=wide, device=number.device)
    return torch.add(total, number, alpha=size)


def _number(value: Any, name: str) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.detach() if value.requires_grad else value
        return value.reshape(()) if value.dim() else value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StateError(
            f"The metric {name!r} returned no number",
            expected="a number, or a tensor with one element",
            actual=f"{type(value).__name__}: {error}",
            remedy="return one number; add each metric of a collection by itself",
        ) from error
