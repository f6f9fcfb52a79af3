"""A step of training: forward, backward, gradients over the ranks, update."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from shardckpt.errors import StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.batch import Result, forward
from shardckpt.nn_handler.epoch_metrics import EpochSums
from shardckpt.nn_handler.optimization import Optimization
from shardckpt.nn_handler.parallel import (
    are_finite,
    average_gradients,
    clip_gradients,
    largest,
    synchronize_buffers,
    synchronize_gradients,
)
from shardckpt.nn_handler.train_options import TrainOptions
from shardckpt.nn_handler.training_state import TrainingState

__all__ = ["Updater"]


class Updater:
    """Makes the steps of one call of NNHandler.train.

    `note` is called when a forward pass or an update begins. `guard` calls a function that may fail
    on this rank alone. `go_back` loads the last checkpoint, and `put_back` restores the buffers of
    the last boundary; see the option `nan_guard`.
    """

    def __init__(
        self,
        handler: TrainingState,
        options: TrainOptions,
        *,
        note: Callable[[Literal["forward", "update"]], None],
        guard: Callable[[Callable[[], Any]], None],
        go_back: Callable[[], None],
        put_back: Callable[[], None],
    ) -> None:
        self.handler, self.options = handler, options
        self.note, self.guard, self.go_back, self.put_back = note, guard, go_back, put_back
        self.autocast = options.autocast(handler.device)
        self.scaler: Any = handler.scaler if self.autocast is not None else None
        self.closure = _needs_closure(handler, options)
        self._updates: list[torch.Tensor] = []  # the losses with which the user's own step updates
        self._counted: list[Callable[[], None]] = []  # what adds to the sums if the loss is finite
        self._passes_by: list[bool] = []  # for each batch: whether DDP averages no gradients of it

    def step(self, group: list[Any], sums: EpochSums) -> torch.Tensor:
        """Train on a group of batches. Returns the loss of the last one, or of the last update."""
        self.note("forward")
        self.handler.updater = self
        try:
            loss = self._step(group, sums)
        finally:
            self.handler.updater = None
        self._after_update()
        return loss

    def _step(self, group: list[Any], sums: EpochSums) -> torch.Tensor:
        self._updates, self._counted, self._passes_by = [], [], []
        if self.closure is not None:
            return self._step_with_closure(self.closure, group, sums)
        self._zero_gradients()
        probes = self._probes()
        with self._unwrapped() if probes else nullcontext():
            losses = self._backward(group, sums)
        if not losses:  # the user's own step has updated the weights
            return self._updates[-1]
        self._average_over_ranks(probes)
        self._update(list(self.handler.optimizations.values()), self._all_parameters, losses)
        return losses[-1]

    def _zero_gradients(self) -> None:
        for optimizer in self.handler.optimizers.values():
            optimizer.zero_grad()

    def _backward(self, group: list[Any], sums: EpochSums | None) -> list[torch.Tensor]:
        """Add up gradients. Returns the loss of each batch."""
        handler = self.handler
        losses: list[torch.Tensor] = []
        for number, batch in enumerate(group, 1):
            if handler.parallel != "none":
                synchronize_gradients(handler.model, now=number == len(group))
            result = self._forward(batch)
            if result is None:
                self._check_updates(group)
                if sums is not None:
                    sums.warn_of_outputs()
                continue
            if self._updates:
                raise StateError(
                    "A training step that calls handler.update returned a loss too",
                    remedy="return None, or leave the update to training and return the loss",
                )
            if not result.loss.requires_grad:
                raise StateError(
                    "The loss does not depend on a parameter that needs gradients",
                    remedy="unfreeze a part of the model, or compute the loss without detach() "
                    "and no_grad()",
                )
            part = result.loss if len(group) == 1 else result.loss / len(group)
            torch.autograd.backward(part if self.scaler is None else self.scaler.scale(part))
            losses.append(result.loss.detach())
            if sums is not None:
                self._count(partial(sums.add, result))
        return losses

    def _forward(self, batch: Any) -> Result | None:
        """Return the result of a batch. Notes whether a step of the user's own bypasses DDP."""
        model = self.handler.model
        if self.handler.training_step is None or not isinstance(
            model, nn.parallel.DistributedDataParallel
        ):
            return forward(self.handler, batch, self.autocast)
        calls: list[None] = []
        hook = model.register_forward_pre_hook(lambda module, args: calls.append(None))
        try:
            result = forward(self.handler, batch, self.autocast)
        finally:
            hook.remove()
        self._passes_by.append(not calls)
        return result

    def _count(self, act: Callable[[], None]) -> None:
        """Add a loss to the sums of the epoch; with a nan_guard, when it is known to be finite."""
        if self.options.nan_guard is None:
            self.guard(act)
        else:
            self._counted.append(act)

    def _check_updates(self, group: list[Any]) -> None:
        if len(group) > 1:
            raise StateError(
                "A training step that calls update can't accumulate gradients",
                actual=f"gradient_accumulation_steps={len(group)}",
                remedy="leave it out, or return the loss from the step",
            )
        if not self._updates:
            raise StateError(
                "The training step returned None and did not call handler.update",
                remedy="return the loss, or call handler.update(loss)",
            )

    def update(self, loss: torch.Tensor, name: str) -> None:
        """Run the backward pass of a loss and step one optimizer; see TrainingState.update."""
        handler, one = self.handler, self.handler.optimizations[name]
        self._updates.append(loss.detach())
        self._count(partial(handler.log_loss, self._updates[-1], name))
        one.optimizer.zero_grad()
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        parameters = [p for group in one.optimizer.param_groups for p in group["params"]]
        if handler.parallel == "ddp":
            average_gradients(parameters)
        self._update([one], lambda: parameters, self._updates[-1:])

    def _all_parameters(self) -> Iterable[nn.Parameter]:
        handler = self.handler
        return itertools.chain(handler.model.parameters(), handler.loss_parameters())

    def _update(
        self,
        chosen: list[Optimization],
        parameters: Callable[[], Iterable[nn.Parameter]],
        losses: list[torch.Tensor],
    ) -> None:
        """Clip gradients and step optimizers and their schedulers, unless the nan_guard acts."""
        if not self._may_update(losses, parameters):
            return
        if self.options.gradient_clipping_norm is not None:
            for one in chosen if self.scaler is not None else ():
                self.scaler.unscale_(one.optimizer)
            clip_gradients(parameters(), self.options.gradient_clipping_norm)
        self.handler.note_rates()
        self.note("update")
        schedulers = [one.scheduler for one in chosen if one.scheduler is not None]
        by_step = [scheduler for scheduler in schedulers if scheduler.interval == "step"]
        before = self._scale() if by_step else 0.0
        self._step_optimizers(chosen)
        if by_step and self._scale() >= before:  # otherwise the scaler has skipped the step
            for scheduler in by_step:
                scheduler.after_step()

    def _scale(self) -> float:
        """Return the scale of the gradients. Reading it waits for the device."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _step_optimizers(self, chosen: list[Optimization]) -> None:
        for one in chosen:
            if self.scaler is None:
                one.optimizer.step()
            else:
                self.scaler.step(one.optimizer)
        if self.scaler is not None:
            self.scaler.update()

    def _step_with_closure(
        self, one: Optimization, group: list[Any], sums: EpochSums
    ) -> torch.Tensor:
        """Run a step of an optimizer that computes the loss several times, such as LBFGS."""
        handler, norm = self.handler, self.options.gradient_clipping_norm
        losses: list[torch.Tensor] = []

        def closure() -> torch.Tensor:
            self._zero_gradients()
            probes = self._probes()
            with self._unwrapped() if probes else nullcontext():
                found = self._backward(group, None if losses else sums)
            mean = torch.stack(found).mean()
            self._average_over_ranks(probes)
            if handler.parallel != "none":  # all ranks must take the same decisions
                dist.all_reduce(mean.div_(handler.world_size))
            if norm is not None:
                clip_gradients(handler.model.parameters(), norm)
            if not losses:
                handler.note_rates()
                self.note("update")
            losses.append(found[-1])
            return mean

        one.optimizer.step(closure)  # type: ignore[arg-type]
        if one.scheduler is not None:
            one.scheduler.after_step()
        return losses[0]

    def _probes(self) -> bool:
        """Whether this step determines if DDP must look for parameters without gradients."""
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

    def _average_over_ranks(self, probes: bool) -> None:
        """Average the gradients that no wrapper of the model averages. Collective."""
        handler = self.handler
        if probes:
            handler.probed = True
            used = average_gradients(handler.module.parameters())
            if not all(used):
                handler.rewrap(find_unused=True)
        elif any(self._passes_by):
            if not all(self._passes_by):
                raise StateError(
                    "The training step used handler.model for some batches of one step alone",
                    expected="handler.model for all of them, or handler.module for all of them",
                )
            average_gradients(handler.module.parameters())
        if handler.parallel != "none" and handler.loss_module is not None:
            average_gradients(handler.loss_parameters())

    def _may_update(
        self, losses: list[torch.Tensor], parameters: Callable[[], Iterable[nn.Parameter]]
    ) -> bool:
        """Whether the nan_guard allows an update of the weights. Collective if there is one."""
        if self.options.nan_guard is None:
            return True
        counted, self._counted = self._counted, []
        found = "The loss"
        wrong = [loss for loss in losses if not torch.isfinite(loss)]
        if not largest([len(wrong)])[0]:
            # a gradient scaler looks at gradients by itself
            if self.scaler is not None or not largest([int(not are_finite(parameters()))])[0]:
                for act in counted:
                    self.guard(act)
                return True
            found = "A gradient"
        if self.options.nan_guard == "stop":
            raise StateError(
                f"{found} is not finite",
                expected="finite numbers on every rank",
                actual=f"a loss of {float((wrong or losses)[0])} on rank {self.handler.rank}, "
                f"step {self.handler.step + 1}",
                remedy="lower the learning rate, clip gradients, or skip such steps with "
                'nan_guard="skip"',
            )
        text = f"{found} of step {self.handler.step + 1} is not finite on some rank"
        if self.options.nan_guard == "restore":
            if self.handler.rank == 0:
                warn(f"{text}: the weights of the last checkpoint are loaded")
            self.go_back()
        else:
            if self.handler.rank == 0:
                warn(f"{text}: the step is skipped")
            self.put_back()
        return False

    def _after_update(self) -> None:
        handler = self.handler
        if handler.parallel != "none":
            synchronize_buffers(handler.module, handler.layout)
        if handler.ema is not None:
            handler.ema.update(handler.model)


def _needs_closure(handler: TrainingState, options: TrainOptions) -> Optimization | None:
    """Return the optimizer that needs a closure. Raises StateError if training can't
    provide it."""
    found = [one for one in handler.optimizations.values() if one.needs_closure]
    if not found:
        return None
    problems = {
        "other optimizers beside it": len(handler.optimizations) > 1,
        "a gradient scaler (fp16)": options.scales(handler.device),
        "a nan_guard": options.nan_guard is not None,
        "parallel='fsdp'": handler.parallel == "fsdp",
    }
    wrong = [text for text, present in problems.items() if present]
    if wrong:
        raise StateError(
            f"{type(found[0].optimizer).__name__} computes the loss several times in each step",
            expected="one optimizer in full precision or bf16, on one process or under DDP",
            actual=", ".join(wrong),
        )
    return found[0]
