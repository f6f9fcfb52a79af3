"""The training loop."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DistributedSampler

from shardckpt.errors import StateError
from shardckpt.nn_handler.parallel import mean_over_ranks
from shardckpt.nn_handler.saving import remove

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = ["run_training"]


def run_training(
    handler: NNHandler,
    *,
    epochs: int,
    validate_every: int,
    accumulate: int,
    clip_norm: float | None,
    progress_bar: bool,
) -> dict[str, list[float]]:
    """Train for `epochs` more epochs; collective. See NNHandler.train."""
    _check(handler, epochs, validate_every, accumulate)
    end = handler.epoch + epochs
    while handler.epoch < end:
        handler.epoch += 1
        results = _train_epoch(handler, accumulate, clip_norm)
        if handler.val_data is not None and validate_every and not handler.epoch % validate_every:
            results |= {f"val_{name}": value for name, value in _validate(handler).items()}
        if isinstance(handler.scheduler, ReduceLROnPlateau):
            handler.scheduler.step(results.get("val_loss", results["loss"]))
        elif handler.scheduler is not None:
            handler.scheduler.step()
        for name, value in results.items():
            handler.history.setdefault(name, []).append(value)
        if progress_bar and handler.rank == 0:
            print(_line(handler.epoch, end, results), file=sys.stderr)
        _auto_save(handler, results, last=handler.epoch == end)
    return handler.history


def _check(handler: NNHandler, epochs: int, validate_every: int, accumulate: int) -> None:
    missing = {
        "set_optimizer": handler.optimizer,
        "set_loss_fn": handler.loss_fn,
        "set_train_loader": handler.train_data,
    }
    for setter, value in missing.items():
        if value is None:
            raise StateError("The handler can't train yet", remedy=f"call {setter} first")
    for name, number, least in (
        ("epochs", epochs, 0),
        ("validate_every", validate_every, 0),
        ("gradient_accumulation_steps", accumulate, 1),
    ):
        if not isinstance(number, int) or number < least:
            raise StateError(
                f"train was given a bad {name}",
                expected=f"an int from {least}",
                actual=repr(number),
            )


def _train_epoch(handler: NNHandler, accumulate: int, clip_norm: float | None) -> dict[str, float]:
    assert handler.train_data is not None
    assert handler.optimizer is not None
    sampler = handler.train_data.sampler
    if isinstance(sampler, DistributedSampler):
        sampler.set_epoch(handler.epoch)
    handler.model.train()
    rate = handler.optimizer.param_groups[0]["lr"]
    sums = _Sums(handler)
    batches = iter(handler.train_data)
    while group := list(itertools.islice(batches, accumulate)):
        handler.optimizer.zero_grad()
        for batch in group:
            loss, outputs, targets = _forward(handler, batch)
            torch.autograd.backward(loss / len(group))
            sums.add(loss, outputs, targets)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(handler.model.parameters(), clip_norm)
        handler.optimizer.step()
        handler.step += 1
    return {**sums.means(), "lr": float(rate)}


@torch.no_grad()
def _validate(handler: NNHandler) -> dict[str, float]:
    assert handler.val_data is not None
    loader, counted = handler.val_data
    handler.model.eval()
    sums = _Sums(handler)
    for number, batch in enumerate(loader):
        loss, outputs, targets = _forward(handler, batch)
        if number < counted:
            sums.add(loss, outputs, targets)
    handler.model.train()
    return sums.means()


def _forward(handler: NNHandler, batch: Any) -> tuple[torch.Tensor, Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise StateError(
            "A batch is not what training needs",
            expected="(inputs, targets)",
            actual=type(batch).__name__,
            remedy="give the loader a dataset of pairs, or a collate_fn that makes them",
        )
    assert handler.loss_fn is not None
    inputs, targets = (_to(part, handler.device) for part in batch)
    outputs = handler.model(inputs)
    return handler.loss_fn(outputs, targets), outputs, targets


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, device) for item in value)
    return value


class _Sums:
    """Loss and metrics, summed over samples."""

    def __init__(self, handler: NNHandler) -> None:
        self.handler = handler
        self.sums = dict.fromkeys(["loss", *handler.metrics], 0.0)
        self.count = 0

    def add(self, loss: torch.Tensor, outputs: Any, targets: Any) -> None:
        size = len(targets)
        self.count += size
        self.sums["loss"] += float(loss.detach()) * size
        with torch.no_grad():
            for name, metric in self.handler.metrics.items():
                self.sums[name] += float(metric(outputs, targets)) * size

    def means(self) -> dict[str, float]:
        return mean_over_ranks(self.sums, self.count, self.handler.device)


def _line(epoch: int, end: int, results: dict[str, float]) -> str:
    return f"epoch {epoch}/{end}  " + "  ".join(f"{k} {v:.4g}" for k, v in results.items())


def _auto_save(handler: NNHandler, results: dict[str, float], *, last: bool) -> None:
    saver = handler.auto_saver
    if saver is None or not saver.due(epoch=handler.epoch, last=last):
        return
    target = saver.target({"epoch": handler.epoch, "step": handler.step, **results})
    # Noted before saving, so that the checkpoint itself knows it is the newest.
    before = saver.last
    old = saver.saved(target)
    try:
        handler.save(target)
    except BaseException:
        saver.last = before
        raise
    if old is not None and handler.rank == 0:
        remove(old)
    if dist.is_initialized():
        dist.barrier()
