"""One step of the optimizer: forward, backward, gradients over the ranks, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from shardckpt.errors import StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.batch import forward
from shardckpt.nn_handler.epoch_metrics import EpochSums
from shardckpt.nn_handler.parallel import (
    average_gradients,
    clip_gradients,
    largest,
    synchronise_buffers,
    synchronise_gradients,
)
from shardckpt.nn_handler.train_options import TrainOptions
from shardckpt.nn_handler.training_state import TrainingState

__all__ = ["Updater"]


class Updater:
    """Makes the steps of one call of NNHandler.train.

    `note` hears that a forward or an update begins; `guard` does what may fail on this rank
    alone.
    """

    def __init__(
        self,
        handler: TrainingState,
        options: TrainOptions,
        note: Callable[[Literal["forward", "update"]], None],
        guard: Callable[[Callable[[], Any]], None],
    ) -> None:
        self.handler, self.options, self.note, self.guard = handler, options, note, guard
        self.autocast = options.autocast(handler.device)

    def step(self, group: list[Any], sums: EpochSums) -> torch.Tensor | float:
        """One step over a group of batches; the loss of the last one."""
        handler = self.handler
        assert handler.optimizer is not None
        self.note("forward")
        handler.optimizer.zero_grad()
        scaler = handler.scaler if self.autocast is not None else None
        probes = self._probes()
        with self._unwrapped() if probes else _as_it_is():
            loss = self._backward(group, sums, scaler)
        if loss is None:  # a step of the user's own that updates the weights by itself
            self._after_update()
            return 0.0
        self._gradients_of_ranks(probes)
        updates = self._finite(loss)
        if updates and self.options.gradient_clipping_norm is not None:
            if scaler is not None:
                scaler.unscale_(handler.optimizer)
            clip_gradients(self._parameters(), self.options.gradient_clipping_norm)
        handler.rate = float(handler.optimizer.param_groups[0]["lr"])
        self.note("update")
        if updates and self._update(scaler) and handler.scheduler is not None:
            handler.scheduler.after_step()
        self._after_update()
        return loss

    def _backward(self, group: list[Any], sums: EpochSums, scaler: Any) -> torch.Tensor | None:
        handler, loss = self.handler, None
        for number, batch in enumerate(group, 1):
            synchronise_gradients(handler.model, now=number == len(group))
            result = forward(handler, batch, self.autocast)
            if result is None:
                continue
            part = result.loss / len(group)
            torch.autograd.backward(part if scaler is None else scaler.scale(part))
            loss = result.loss.detach()
            self.guard(lambda result=result: sums.add(result))  # type: ignore[misc]
        return loss

    def _probes(self) -> bool:
        """Whether this step is to find out if DDP must look for parameters without gradients."""
        handler = self.handler
        asked = {"find_unused_parameters", "static_graph"} & handler.layout.options.keys()
        wrapped = isinstance(handler.model, nn.parallel.DistributedDataParallel)
        return wrapped and not handler.probed and not asked

    @contextmanager
    def _unwrapped(self) -> Iterator[None]:
        wrapped, self.handler.model = self.handler.model, self.handler.module
        try:
            yield
        finally:
            self.handler.model = wrapped

    def _gradients_of_ranks(self, probes: bool) -> None:
        handler = self.handler
        if probes:
            handler.probed = True
            used = average_gradients(handler.module.parameters())
            if not all(used):
                handler.rewrap(find_unused=True)
        if handler.loss_module is not None and handler.parallel != "none":
            average_gradients(handler.loss_module.parameters())

    def _parameters(self) -> list[nn.Parameter]:
        loss = self.handler.loss_module
        return [*self.handler.model.parameters(), *(loss.parameters() if loss is not None else ())]

    def _finite(self, loss: torch.Tensor) -> bool:
        """Whether the weights may be updated, by the nan_guard; collective if there is one."""
        if self.options.nan_guard is None:
            return True
        bad = largest([int(not bool(torch.isfinite(loss)))], self.handler.device)[0]
        if bad and self.options.nan_guard == "stop":
            raise StateError(
                "The loss is not finite",
                expected="a number on every rank",
                actual=f"{float(loss)} on rank {self.handler.rank}, step {self.handler.step}",
                remedy='lower the rate, clip gradients, or skip such steps: nan_guard="skip"',
            )
        if bad:
            warn(f"Step {self.handler.step} is skipped: the loss is not finite on some rank")
        return not bad

    def _update(self, scaler: Any) -> bool:
        """Step the optimizer; False if the scaler skipped that."""
        optimizer = self.handler.optimizer
        assert optimizer is not None
        if scaler is None:
            optimizer.step()
            return True
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        return bool(scaler.get_scale() >= before)

    def _after_update(self) -> None:
        handler = self.handler
        synchronise_buffers(handler.module, handler.layout)
        if handler.ema is not None:
            handler.ema.update(handler.model)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
