"""What a handler consists of: the setters of its parts, and what a checkpoint holds of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import shardckpt
from shardckpt.errors import StateError
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.callbacks import Callback, Hook
from shardckpt.nn_handler.data import Position, TrainData, ValData
from shardckpt.nn_handler.ema import EMA
from shardckpt.nn_handler.groups import Groups, grouped
from shardckpt.nn_handler.model_code import collect_code
from shardckpt.nn_handler.objects import describe, warn_of_absent
from shardckpt.nn_handler.parallel import Layout, Parallel, start, wrap
from shardckpt.nn_handler.random_state import random_state, seed_generators
from shardckpt.nn_handler.scheduling import Interval, Scheduler

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = ["Parts"]


class Parts:
    """A model with its optimizer, scheduler, loss, loaders, metrics and callbacks."""

    def __init__(
        self,
        model_class: Callable[..., nn.Module],
        device: str | torch.device | None = None,
        save_model_code: bool = False,
        *,
        parallel: Parallel = "auto",
        device_mesh: Any = None,
        tp_plan: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> None:
        self.layout: Layout = start(parallel, device, device_mesh, tp_plan)
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Scheduler | None = None
        self.scaler: Any = None
        self.ema: EMA | None = None
        self.loss_fn: Callable[..., Any] | None = None
        self.metrics: dict[str, Callable[..., Any]] = {}
        self.callbacks: list[Callback] = []
        self.train_data: TrainData | None = None
        self.val_data: ValData | None = None
        self.auto_saver: AutoSaver | None = None
        self.epoch = 0
        self.step = 0
        self.history: dict[str, list[float]] = {}
        self.stop_training = False
        self.validates = True  # whether the call of train does so at all
        self.model_code: dict[str, str] | None = None
        # What the trainer goes on from; see Trainer, and begin_run.
        self.position = Position()
        self.boundary: dict[str, Any] | None = None
        self.rate = 0.0
        self.seed_value = 0
        self.runs: list[int] = []
        self.run_id: str | None = None
        self._replayed: int | None = None
        self._frozen: list[str] = []
        self._compile: dict[str, Any] | None = None
        self._optimizer: dict[str, Any] | None = None
        self._warned: set[str] = set()
        self._save_code = save_model_code
        self._class_name: Any = None
        self.set_model(model_class, **model_kwargs)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.layout.device

    @property
    def parallel(self) -> Parallel:
        """How the job is spread, as resolved."""
        return self.layout.mode

    @property
    def rank(self) -> int:
        """This process's rank, 0 without a process group."""
        return self.layout.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def module(self) -> nn.Module:
        """The model as its class made it, without DDP around it."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.module  # type: ignore[no-any-return]
        return self.model

    def set_model(self, model_class: Callable[..., nn.Module], **model_kwargs: Any) -> None:
        """Make another model; collective. Before set_optimizer, which holds its parameters."""
        if self.optimizer is not None:
            raise StateError(
                "The optimizer holds the parameters of the model so far",
                remedy="call set_model before set_optimizer",
            )
        if isinstance(model_class, nn.Module):
            raise StateError(
                "A model was given, where its class was expected",
                actual=type(model_class).__name__,
                remedy="give the class and its arguments, as in NNHandler(Net, width=32): "
                "a checkpoint holds them, and load makes the model anew",
            )
        self.model_class, self.model_kwargs = model_class, model_kwargs
        self.model = wrap(model_class(**model_kwargs), self.layout)
        self.ema = None
        self._frozen, self._compile, self._class_name = [], None, None
        self.model_code = collect_code(model_class) if self._save_code else None

    def set_optimizer(
        self,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        *,
        groups: Groups | None = None,
        **options: Any,
    ) -> None:
        """Optimise the model's parameters that are not frozen.

        `groups` gives some of them options of their own: a dict of name prefix -> options, or a
        list of dicts as torch has it, whose "params" are parameters, names or prefixes.
        """
        chosen, named = grouped(self.module, groups)
        optimizer = optimizer_class(chosen, **options)
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise StateError(
                "This optimizer computes the loss several times a step, which train does not",
                expected="an optimizer whose step needs no closure",
                actual=type(optimizer).__name__,
            )
        self.optimizer = optimizer
        self.rate = float(self.optimizer.param_groups[0]["lr"])
        self._optimizer = {"class": optimizer_class, "groups": named, "options": options}

    def set_scheduler(
        self,
        scheduler_class: Callable[..., Any],
        *,
        interval: Interval | None = None,
        monitor: str = "val_loss",
        **options: Any,
    ) -> None:
        """A learning-rate scheduler; needs the optimizer first.

        Stepped after each epoch, or with interval="step" (the default of OneCycleLR and CyclicLR)
        after each step of the optimizer. ReduceLROnPlateau looks at the metric `monitor`. The
        option `schedulers` of SequentialLR and ChainedScheduler is a list of (class, options).
        """
        if self.optimizer is None:
            raise StateError("A scheduler needs an optimizer", remedy="call set_optimizer first")
        self.scheduler = Scheduler(
            self.optimizer, scheduler_class, options, interval=interval, monitor=monitor
        )
        self.rate = float(self.optimizer.param_groups[0]["lr"])

    def set_grad_scaler(self, **options: Any) -> None:
        """A torch.amp.GradScaler for use_amp; on CUDA train makes one if there is none."""
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.scaler = torch.amp.GradScaler(kind, **options)

    def set_loss_fn(self, loss_fn: Callable[..., Any]) -> None:
        """loss_fn(outputs, targets) -> a scalar tensor, the mean over the batch."""
        placed = isinstance(loss_fn, nn.Module) and self.device.type != "meta"
        self.loss_fn = loss_fn.to(self.device) if placed else loss_fn  # type: ignore[attr-defined]

    def add_metric(self, name: str, metric: Callable[..., Any]) -> None:
        """metric(outputs, targets) -> a number, the mean over the batch; for training and
        validation (as `val_<name>`)."""
        if not name or name in ("loss", "lr", "epoch", "step") or name.startswith("val_"):
            raise StateError("This name of a metric is taken", actual=repr(name))
        self.metrics[name] = metric

    def set_train_loader(self, data: Dataset[Any] | DataLoader[Any], **loader_options: Any) -> None:
        """A Dataset with a DataLoader's options, or a DataLoader; each rank sees its part."""
        self.train_data = TrainData(data, loader_options, self.layout)

    def set_val_loader(self, data: Dataset[Any] | DataLoader[Any], **loader_options: Any) -> None:
        """As set_train_loader; every sample is seen by one rank, once."""
        self.val_data = ValData(data, loader_options, self.layout)

    def add_callback(self, callback: Callback | Callable[[NNHandler, Any], Any]) -> None:
        """A Callback, or a function of (handler, metrics) that is called after each epoch."""
        if isinstance(callback, type) or not callable(callback) | isinstance(callback, Callback):
            raise StateError(
                "This is no callback",
                expected="an instance of Callback, or a function",
                actual=repr(callback),
            )
        self.callbacks.append(callback if isinstance(callback, Callback) else Hook(callback))

    def seed(self, seed: int) -> None:
        """Seed random numbers (rank r with seed + r) and the order of the data."""
        self.seed_value = int(seed)
        seed_generators(self.seed_value + self.layout.data[0])

    def freeze_module(self, name: str, *, freeze: bool = True) -> None:
        """Don't train the submodule of a name, and leave it in evaluation mode; or do again."""
        try:
            module = self.module.get_submodule(name)
        except AttributeError as error:
            raise StateError(
                "The model has no such module",
                expected=", ".join(n for n, _ in self.module.named_modules() if n),
                actual=name,
            ) from error
        module.requires_grad_(not freeze)
        self._frozen = [n for n in self._frozen if n != name] + ([name] if freeze else [])
        if self.parallel == "ddp":  # DDP counts on the parameters that it saw when it was made
            self.model = wrap(self.module, self.layout)

    def compile_model(self, **options: Any) -> None:
        """torch.compile the model, in place: names of parameters stay as they are."""
        self.model.compile(**options)
        self._compile = options

    def train_mode(self) -> None:
        """Training mode for all but frozen modules."""
        self.model.train()
        for name in self._frozen:
            self.module.get_submodule(name).eval()

    def metric_names(self) -> set[str]:
        """The names that epochs bring metrics under."""
        names = {"loss", *self.metrics}
        if self.val_data is not None and self.validates:
            names |= {f"val_{name}" for name in names}
        return names | {"epoch", "step", "lr"}

    def replaying(self) -> bool:
        """Whether the next call of train was begun before a resume."""
        return self._replayed is not None and self._replayed < len(self.runs)

    def begin_run(self, epochs: int, *, resumed: bool) -> int:
        """Note a call of train; the epoch at which it ends. After a resume the calls that were
        made before are met again, and end where they would have ended."""
        if resumed:
            self._replayed = 0
        if self.replaying():
            assert self._replayed is not None
            begun = self.runs[self._replayed]
            self._replayed += 1
            return begun + epochs
        self.stop_training = False
        self.runs.append(self.epoch)
        return self.epoch + epochs

    def config(self) -> dict[str, Any]:
        """What rebuilds the handler, as plain data; see shardckpt.nn_handler.objects."""
        config: dict[str, Any] = {
            "model": describe({"class": self.model_class, "kwargs": self.model_kwargs}),
            "optimizer": describe(self._optimizer),
            "scheduler": self.scheduler and self.scheduler.description(),
            "loss_fn": describe(self.loss_fn),
            "metrics": describe(self.metrics),
            "callbacks": describe(
                [
                    {"class": type(c), "args": list(c.arguments[0]), "kwargs": c.arguments[1]}
                    for c in self.callbacks
                ]
            ),
            "auto_saver": self.auto_saver and self.auto_saver.description(),
            "frozen": list(self._frozen),
            "compile": describe(self._compile),
            "code": self.model_code,
        }
        if self._class_name is not None:
            config["model"]["class"] = self._class_name
        return config

    def callback_states(self) -> dict[str, Any]:
        """The kind and state of each callback, as plain data."""
        return {
            str(number): {"kind": type(callback).__name__, "state": callback.state_dict()}
            for number, callback in enumerate(self.callbacks)
        }

    def adopt_code(self, code: dict[str, str] | None, class_name: Any) -> None:
        """Keep the source that came with a checkpoint, and the name of a class made by it."""
        self.model_code, self._class_name = code, class_name

    def use_device(self, device: torch.device) -> None:
        """Send inputs to another device."""
        self.layout = Layout(mode="none", device=device)

    def random_now(self) -> dict[str, Any]:
        """The state of this process's random-number generators."""
        return random_state()

    def tensor_state(self) -> dict[str, Any]:
        """The part of the state that is loaded in place."""
        state: dict[str, Any] = {"model": self.model}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer
        if isinstance(self.loss_fn, nn.Module) and self.loss_fn.state_dict():
            state["loss_fn"] = self.loss_fn
        return state

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as shardckpt.save takes it."""
        config = self.config()
        if self.rank == 0:
            warn_of_absent(config, self._warned)
        position = self.position
        boundary = self.boundary or {"random": random_state(), "sums": None}
        state = self.tensor_state()
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            state["ema"] = {"decay": self.ema.decay, "weights": self.ema.weights}
        return {
            **state,
            "progress": {
                "epoch": self.epoch,
                "step": self.step,
                "position": {
                    "samples": position.samples,
                    "batches": position.batches,
                    "length": position.length,
                    "seed": position.seed,
                },
                "runs": self.runs,
                "run_id": self.run_id,
                "history": self.history,
                "rate": self.rate,
                "seed": self.seed_value,
                "stopped": self.stop_training,
            },
            "callbacks": self.callback_states(),
            "ranks": shardckpt.PerRank({**boundary, "epoch_random": position.random}),
            "config": config,
        }
