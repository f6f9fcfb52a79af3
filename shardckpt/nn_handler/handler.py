"""NNHandler: what is trained, and the calls that train, save and load it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import shardckpt
from shardckpt.errors import StateError
from shardckpt.nn_handler import loading, saving
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.objects import describe, name_of
from shardckpt.nn_handler.parallel import Parallel, start, train_loader, val_loader, world, wrap
from shardckpt.nn_handler.trainer import run_training
from shardckpt.planning.device_map import DeviceMap

__all__ = ["NNHandler"]


class NNHandler:
    """A model with its optimizer, scheduler, loss, loaders and metrics.

    The same script runs under python and torchrun: `parallel` is "auto" (DDP where a launcher
    started several processes), "none", "ddp" or "fsdp" (FSDP2). Everything that a checkpoint
    holds is plain data: classes and functions are saved by their import names.
    """

    def __init__(
        self,
        model_class: Callable[..., nn.Module],
        device: str | torch.device = "cpu",
        *,
        parallel: Parallel = "auto",
        seed: int = 0,
        **model_kwargs: Any,
    ) -> None:
        self.seed = seed
        self.parallel, self.device = start(parallel, device)
        torch.manual_seed(seed)
        self.model_class = model_class
        self.model_kwargs = model_kwargs
        self.model = wrap(model_class(**model_kwargs), self.parallel, self.device)
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        self.loss_fn: Callable[..., Any] | None = None
        self.metrics: dict[str, Callable[..., Any]] = {}
        self.train_data: DataLoader[Any] | None = None
        self.val_data: tuple[DataLoader[Any], int] | None = None
        self.auto_saver: AutoSaver | None = None
        self.epoch = 0
        self.step = 0
        self.history: dict[str, list[float]] = {}
        self._optimizer: dict[str, Any] | None = None
        self._scheduler: dict[str, Any] | None = None

    @property
    def module(self) -> nn.Module:
        """The model as its class made it, without DDP around it."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.module  # type: ignore[no-any-return]
        return self.model

    def set_optimizer(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        *,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        """Optimise the model's parameters; `groups` gives options to parameters by name prefix."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        rest = [p for p in self.model.parameters() if p.requires_grad]
        chosen: list[dict[str, Any]] = []
        for prefix, special in (groups or {}).items():
            mine = [p for p in rest if f"{names[id(p)]}.".startswith(f"{prefix.rstrip('.')}.")]
            if not mine:
                raise StateError(
                    "A parameter group holds no parameter",
                    expected="the prefix of a parameter's name",
                    actual=prefix,
                    remedy="choose among " + ", ".join(sorted(dict(self.module.named_children()))),
                )
            taken = {id(p) for p in mine}
            rest = [p for p in rest if id(p) not in taken]
            chosen.append({"params": mine, **special})
        if rest:
            chosen.insert(0, {"params": rest})
        self.optimizer = optimizer_class(chosen, **options)
        self._optimizer = {
            "name": name_of(optimizer_class, at="optimizer"),
            "groups": {key: dict(value) for key, value in (groups or {}).items()},
            "options": options,
        }

    def set_scheduler(self, scheduler_class: Callable[..., Any], **options: Any) -> None:
        """A learning-rate scheduler, stepped after each epoch; needs the optimizer first."""
        if self.optimizer is None:
            raise StateError("A scheduler needs an optimizer", remedy="call set_optimizer first")
        self.scheduler = scheduler_class(self.optimizer, **options)
        self._scheduler = {"name": name_of(scheduler_class, at="scheduler"), "options": options}

    def set_loss_fn(self, loss_fn: Callable[..., Any]) -> None:
        """loss_fn(outputs, targets) -> a scalar tensor, the mean over the batch."""
        self.loss_fn = loss_fn.to(self.device) if isinstance(loss_fn, nn.Module) else loss_fn

    def add_metric(self, name: str, metric: Callable[..., Any]) -> None:
        """metric(outputs, targets) -> a number, the mean over the batch; for training and
        validation (as `val_<name>`)."""
        self.metrics[name] = metric

    def set_train_loader(self, data: Dataset[Any] | DataLoader[Any], **loader_options: Any) -> None:
        """A Dataset with a DataLoader's options, or a DataLoader; each rank sees its part."""
        self.train_data = train_loader(data, loader_options, seed=self.seed)

    def set_val_loader(self, data: Dataset[Any] | DataLoader[Any], **loader_options: Any) -> None:
        """As set_train_loader; every sample is seen by one rank, once."""
        self.val_data = val_loader(data, loader_options)

    def auto_save(
        self,
        interval: int | None = 1,
        save_path: str | os.PathLike[str] = "checkpoints",
        name: str = "epoch{epoch}",
        overwrite: bool = False,
    ) -> None:
        """Save while training; see AutoSaver. The name's fields are `epoch`, `step`, `loss`,
        `lr`, `val_loss`, and every metric, also as `val_<metric>`."""
        self.auto_saver = AutoSaver(
            interval=interval, save_path=save_path, name=name, overwrite=overwrite
        )

    def train(
        self,
        epochs: int,
        validate_every: int = 1,
        gradient_accumulation_steps: int = 1,
        gradient_clipping_norm: float | None = None,
        progress_bar: bool = False,
    ) -> dict[str, list[float]]:
        """Train for so many epochs more; collective. Returns the history: metric -> values."""
        return run_training(
            self,
            epochs=epochs,
            validate_every=validate_every,
            accumulate=gradient_accumulation_steps,
            clip_norm=gradient_clipping_norm,
            progress_bar=progress_bar,
        )

    @torch.no_grad()
    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        """The model's outputs, in evaluation mode; collective for a sharded model."""
        training = self.model.training
        self.model.eval()
        try:
            outputs: torch.Tensor = self.model(inputs.to(self.device))
            return outputs
        finally:
            self.model.train(training)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Save everything; collective. A path that ends in .pth or .pt is one torch file,
        written by rank 0; any other is a sharded checkpoint, written by all ranks."""
        saving.save(self, os.fspath(path), overwrite=overwrite)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        parallel: Parallel = "auto",
        strict: bool = True,
        model_class: Callable[..., nn.Module] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        skip_optimizer: bool = False,
        device_map: DeviceMap = None,
    ) -> NNHandler:
        """Rebuild a handler from what save wrote, on any number of ranks; collective.

        Loaders are given anew. `model_class`, `loss_fn` and `metrics` stand in for what can't
        be imported by the name that was saved. With `device_map` the handler is for inference
        in this process alone: the model's tensors go where the map says (see load_state; its
        prefixes are names in the model), inputs follow them, and the optimizer is left out.
        """
        return loading.load(
            cls,
            os.fspath(path),
            device=device,
            parallel=parallel,
            strict=strict,
            model_class=model_class,
            loss_fn=loss_fn,
            metrics=metrics,
            skip_optimizer=skip_optimizer,
            device_map=device_map,
        )

    def config(self) -> dict[str, Any]:
        """What rebuilds the handler, as plain data."""
        return {
            "model": {
                "name": name_of(self.model_class, at="model_class"),
                "kwargs": self.model_kwargs,
            },
            "seed": self.seed,
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "loss_fn": self.loss_fn and describe(self.loss_fn, at="loss_fn"),
            "metrics": {
                name: describe(metric, at=f"metrics.{name}")
                for name, metric in self.metrics.items()
            },
            "auto_saver": self.auto_saver and self.auto_saver.state_dict(),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as shardckpt.save and shardckpt.load take it."""
        state: dict[str, Any] = {"model": self.model}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler
        if isinstance(self.loss_fn, nn.Module) and self.loss_fn.state_dict():
            state["loss_fn"] = self.loss_fn
        state["progress"] = {"epoch": self.epoch, "step": self.step, "history": self.history}
        state["random"] = shardckpt.PerRank(random_state())
        state["config"] = self.config()
        return state

    @property
    def rank(self) -> int:
        """This process's rank, 0 without a process group."""
        return world()[0]


def random_state() -> dict[str, Any]:
    """The state of the random-number generators of this process."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators where random_state found them."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
