"""TrainingState: everything that a checkpoint of a handler holds.

The trainer, the savers, loading and the callbacks use it. NNHandler adds the setters, and the calls
that train, save and load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardckpt.errors import StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.callback import Callback
from shardckpt.nn_handler.data import Position, TrainData, ValData
from shardckpt.nn_handler.ema import EMA
from shardckpt.nn_handler.model_code import in_notebook
from shardckpt.nn_handler.objects import describe, warn_of_absent
from shardckpt.nn_handler.optimization import MAIN, Optimization
from shardckpt.nn_handler.parallel import Layout, Parallel, free_full_parameters, wrap
from shardckpt.nn_handler.save_schedule import check_monitor
from shardckpt.nn_handler.scheduling import Scheduler
from shardckpt.state.markers import PerRank
from shardckpt.state.random_state import random_state

__all__ = ["TrainingState", "check_metric_name"]

_NEVER = 1 << 62


@dataclass(eq=False, repr=False, kw_only=True)
class TrainingState:
    """A model, all that trains it, and the progress of training.

    The trainer resumes from `position`, `boundary`, `rates`, `seed_value`, `runs` and `run_id`; see
    Trainer. `awaited` and `proposed` hold parts of a checkpoint that the program must give or
    confirm.
    """

    layout: Layout
    model: nn.Module = field(init=False)
    model_class: Any = field(init=False)
    model_kwargs: dict[str, Any] = field(init=False)
    optimizations: dict[str, Optimization] = field(default_factory=dict)
    scaler: Any = None
    ema: EMA | None = None
    loss_fn: Callable[..., Any] | None = None
    metrics: dict[str, Callable[..., Any]] = field(default_factory=dict)
    whole_epoch: list[str] = field(default_factory=list)  # metrics of all outputs together
    loss_arguments: dict[str, Any] = field(default_factory=dict)
    passes_epoch: bool = False
    callbacks: list[Callback] = field(default_factory=list)
    train_data: TrainData | None = None
    val_data: ValData | None = None
    auto_saver: Any = None  # an AutoSaver, which works on a TrainingState
    training_step: Callable[..., Any] | None = None
    epoch: int = 0
    step: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    history_epochs: dict[str, list[int]] = field(default_factory=dict)
    stop_training: bool = False
    failed_saves: int = 0  # by auto_save or ModelCheckpoint, in this process
    validates: bool = True  # whether the call of train does so at all
    position: Position = field(default_factory=Position)
    boundary: dict[str, Any] | None = None
    rates: dict[str, float] = field(default_factory=dict)
    seed_value: int = 0
    runs: list[int] = field(default_factory=list)
    run_id: str | None = None
    replayed: int | None = None
    model_code: dict[str, str] | None = None
    frozen: list[str] = field(default_factory=list)
    kept_eval: list[str] = field(default_factory=list)
    compiling: dict[str, Any] | None = None
    hyperparameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    averaging: bool = False  # inside ema_weights()
    trains: bool = False  # inside train()
    sums: Any = None  # the EpochSums that `log` adds to
    updater: Any = None  # the Updater of the step that is being trained
    probed: bool = False  # whether DDP is known to find a gradient for every parameter
    wrapped_for: list[tuple[int, bool]] = field(default_factory=list)  # parameters, with gradients
    validations: list[dict[str, float]] = field(default_factory=list)  # those between epochs
    run_steps: list[int] = field(default_factory=list)
    will_log: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)
    awaited: dict[str, Any] = field(default_factory=dict)
    proposed: dict[str, Any] = field(default_factory=dict)
    loss_tensors: nn.Module | None = None
    class_name: Any = None

    @property
    def device(self) -> torch.device:
        """The device of inputs."""
        return self.layout.device

    @property
    def parallel(self) -> Parallel:
        """The resolved mode: "none", "ddp" or "fsdp"."""
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

    @property
    def loss_module(self) -> nn.Module | None:
        """The loss, if it is a module with parameters to train besides those of the model."""
        loss = self.loss_fn
        trained = any(p.requires_grad for p in self.loss_parameters())
        return loss if trained and isinstance(loss, nn.Module) else None

    def loss_parameters(self) -> list[nn.Parameter]:
        """Internal. Return the parameters of the loss that are not those of the model."""
        if not isinstance(self.loss_fn, nn.Module):
            return []
        models = {id(parameter) for parameter in self.module.parameters()}
        return [p for p in self.loss_fn.parameters() if id(p) not in models]

    def own_parts(self) -> dict[str, Any]:
        """Internal. Return the parts of the handler that callbacks, losses and metrics may hold."""
        parts: dict[str, Any] = {"handler": self}
        parts |= {f"optimizers.{name}": one for name, one in self.optimizers.items()}
        parts |= {f"schedulers.{name}": one for name, one in self.schedulers.items()}
        named = self.module.named_parameters, self.module.named_buffers, self.module.named_modules
        parts |= {f"module.{name}": one for each in named for name, one in each() if name}
        return {**parts, "model": self.model, "module": self.module}  # "module" if they are one

    def train_mode(self) -> None:
        """Internal. Set the training mode, except for modules frozen or kept in evaluation."""
        self.model.train()
        for name in (*self.frozen, *self.kept_eval):
            self.module.get_submodule(name).eval()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Internal. Set the evaluation mode inside a with block, and the former modes after it."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            free_full_parameters(self.module)

    def wrap_again(self) -> None:
        """Internal. Wrap the model again for other parameters that need gradients. Collective."""
        free_full_parameters(self.module)
        now = [(id(p), p.requires_grad) for p in self.module.parameters()]
        if self.parallel == "ddp" and self.wrapped_for != now:
            self.rewrap()
            self.probed = False
        elif self.parallel == "fsdp" and [n for n, _ in self.wrapped_for] != [n for n, _ in now]:
            raise StateError(
                "The model has other parameters than when FSDP2 sharded it",
                actual=f"{len(now)} parameters, {len(self.wrapped_for)} before, or other ones",
                remedy="change it before it is sharded: give a function that creates the whole "
                "model, NNHandler(build)",
            )
        self.wrapped_for = now

    def rewrap(self, *, find_unused: bool = False) -> None:
        """Internal. Create a new DDP around the model. Collective."""
        self.model = wrap(self.module, self.layout, find_unused=find_unused)
        if self.compiling is not None:
            self.model.compile(**self.compiling)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The main optimizer."""
        main = self.optimizations.get(MAIN)
        return None if main is None else main.optimizer

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler of the main optimizer."""
        main = self.optimizations.get(MAIN)
        return None if main is None else main.scheduler

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All optimizers by name; the one without a name is "main"."""
        return {name: one.optimizer for name, one in self.optimizations.items()}

    @property
    def schedulers(self) -> dict[str, Scheduler]:
        """The schedulers by the names of their optimizers."""
        found = {name: one.scheduler for name, one in self.optimizations.items()}
        return {name: one for name, one in found.items() if one is not None}

    def apply_hyperparameters(self, made: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Internal. Set `hyperparameters` in the optimizers and the bases of schedulers.

        `made`: those that the checkpoint's run had set. A schedule may have changed them since.
        """
        for name, options in self.hyperparameters.items():
            known = (made or {}).get(name, {})
            new = {option: v for option, v in options.items() if known.get(option) != v}
            if name in self.optimizations:
                self.optimizations[name].set_options(new)
        if self.hyperparameters:
            self.note_rates()

    def note_rates(self) -> None:
        """Internal. Note the rate of every group as it is now: `lr`, `lr_1`, `lr_<optimizer>`."""
        self.rates = {
            "_".join(["lr", *([] if name == MAIN else [name]), *([str(at)] if at else [])]): rate
            for name, one in self.optimizations.items()
            for at, rate in enumerate(one.rates)
        }

    def untrained(self) -> list[str]:
        """Internal. Return the names of the parameters to train that no optimizer holds."""
        free_full_parameters(self.module)
        held = {
            id(p)
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
            for p in group["params"]
        }
        return [
            name
            for name, p in self.module.named_parameters()
            if p.requires_grad and id(p) not in held
        ]

    def metric_names(self) -> set[str]:
        """Internal. Return the names of all metrics of an epoch."""
        names = {"loss", *self.metrics}
        if self.training_step is not None:  # which may call `update`
            names |= {f"loss_{name}" for name in self.optimizations if name != MAIN}
        if self.val_data is not None and self.validates:
            names |= {f"val_{name}" for name in names}
        return names | {"epoch", "step", *self.rates} | self.will_log

    def check_monitor(self, monitor: str) -> None:
        """Internal. Raise StateError for a metric that training never computes."""
        check_monitor(monitor, self.metric_names())

    def replaying(self) -> bool:
        """Internal. Whether the next call of train repeats one from before a resume."""
        return self.replayed is not None and self.replayed < len(self.runs)

    def begin_run(
        self, epochs: int | None, max_steps: int | None, *, resumed: bool
    ) -> tuple[int, int]:
        """Internal. Note a call of train, and return the epoch and the step at which it ends.

        After a resume, the calls before it are made again, and end where they would have ended.
        """
        if resumed:
            self.replayed = 0
        if self.replayed is not None and self.replaying():
            number = self.replayed
            self.replayed += 1
        else:
            number = len(self.runs)
            self.stop_training = False
            self.runs.append(self.epoch)
            self.run_steps.append(self.step)
        begun = self.run_steps[number] if number < len(self.run_steps) else self.step
        return (
            _NEVER if epochs is None else self.runs[number] + epochs,
            _NEVER if max_steps is None else begun + max_steps,
        )

    def set_grad_scaler(self, **options: Any) -> None:
        """Set the gradient scaler for float16. By default train creates one. Not collective.

        Args:
            options: The arguments of torch.amp.GradScaler.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_grad_scaler(init_scale=1024.0)
        """
        self.scaler = torch.amp.GradScaler(self.device.type, **options)

    def log(self, name: str, value: Any) -> None:
        """Add a value to the metrics of an epoch, in a step, a loss or a hook of batches and steps.

        The history gets the mean over the epoch and the ranks, as `name`, or as `val_<name>` if it
        is logged during validation. Not collective.

        Args:
            name: The metric. To monitor it or to use it in the name of a checkpoint, announce it
                before training with `handler.will_log.add(name)`.
            value: A number, or a tensor with one element.

        Raises:
            StateError: No epoch is being trained or validated, the name is taken, or the value is
                not a number.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_optimizer(torch.optim.SGD, lr=0.1)
            >>> handler.set_train_loader([torch.ones(8, 4)])
            >>> def step(handler, batch):
            ...     outputs = handler.model(batch)
            ...     handler.log("largest", outputs.max())
            ...     return outputs.square().mean()
            >>> handler.set_training_step(step)
            >>> sorted(handler.train(1, progress_bar=False))
            ['largest', 'loss', 'lr']
        """
        if self.sums is None:
            raise StateError(
                "log was called outside of an epoch",
                actual=name,
                remedy="call it in a training step, in a loss, or in the hooks of batches and "
                "steps",
            )
        check_metric_name(name)
        self.sums.log(name, value)

    def update(self, loss: torch.Tensor, optimizer: str = MAIN) -> None:
        """Run the backward pass and step one optimizer, in a training step of your own.

        Clears the gradients of the optimizer, averages them over the ranks, applies the options of
        `train` (precision, clipping, nan_guard), and steps the scheduler. In validation it does
        nothing. The history gets the mean loss, as `loss` or `loss_<optimizer>`. Collective.

        Args:
            loss: A scalar tensor.
            optimizer: The name of the optimizer; see set_optimizer.

        Raises:
            StateError: The handler has no such optimizer, or no step is being trained.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_optimizer(torch.optim.SGD, lr=0.1)
            >>> handler.set_train_loader([torch.ones(8, 4)])
            >>> def step(handler, batch):
            ...     handler.update(handler.module(batch).square().mean())
            >>> handler.set_training_step(step)
            >>> history = handler.train(2, progress_bar=False)
            >>> history["loss"][1] < history["loss"][0]
            True
        """
        self._optimization(optimizer)
        if self.sums is None:
            raise StateError(
                "update was called outside of training",
                remedy="call it in a training step; see set_training_step",
            )
        if self.updater is not None:
            self.updater.update(loss, optimizer)
        else:  # in validation
            self.log_loss(loss, optimizer)

    def _optimization(self, name: str) -> Optimization:
        """Return the optimizer with a name. Raises StateError for an unknown name."""
        if name not in self.optimizations:
            raise StateError(
                "The handler has no optimizer of this name",
                expected=", ".join(self.optimizations) or "an optimizer",
                actual=repr(name),
                remedy="call set_optimizer first",
            )
        return self.optimizations[name]

    def log_loss(self, loss: torch.Tensor, optimizer: str) -> None:
        """Internal. Add the loss of one optimizer to an epoch's metrics."""
        self.sums.log("loss" if optimizer == MAIN else f"loss_{optimizer}", loss.detach())

    def check_given(self) -> None:
        """Internal. Raise StateError if a loss or metric of a checkpoint must still be given."""
        if self.awaited:
            setters = {"loss_fn": "set_loss_fn(...)", "own_step": "set_training_step(...)"}
            ways = [setters.get(at, f"add_metric({at[8:]!r}, ...)") for at in self.awaited]
            raise StateError(
                "The checkpoint names a loss, metrics or a step that load could not resolve",
                expected=", ".join(f"{at}: {text}" for at, text in self.awaited.items()),
                remedy=f"call {', '.join(ways)}, or before load shardckpt.trust the module that "
                "defines them",
            )

    def config(self) -> dict[str, Any]:
        """Internal. Return the arguments of all parts as plain data. See nn_handler/objects."""
        own = {id(part): name for name, part in self.own_parts().items()}
        described: dict[str, Any] = {
            name: {
                "optimizer": one.description(self.module, self.loss_module),
                "scheduler": one.scheduler and one.scheduler.description(),
            }
            for name, one in self.optimizations.items()
        }
        config: dict[str, Any] = {
            "model": describe(
                {"class": self.model_class, "kwargs": self.model_kwargs}, holds_tensors=True
            ),
            **described.pop(MAIN, {"optimizer": None, "scheduler": None}),
            "optimizers": described,
            "loss_fn": describe(
                self.loss_fn, own, holds_tensors=isinstance(self.loss_fn, nn.Module)
            ),
            "loss_arguments": describe(self.loss_arguments, own),
            "pass_epoch_to_loss": self.passes_epoch,
            "metrics": describe(self.metrics, own),
            "whole_epoch": list(self.whole_epoch),
            "callbacks": describe(
                [
                    {"class": type(c), "args": list(args), "kwargs": kwargs}
                    for c in self.callbacks
                    for args, kwargs in [c.constructor_arguments]
                ],
                own,
            ),
            "auto_saver": self.auto_saver and self.auto_saver.description(),
            "frozen": list(self.frozen),
            "kept_eval": list(self.kept_eval),
            "own_step": self.training_step is not None,
            "untrained": [n for n, p in self.module.named_parameters() if not p.requires_grad],
            "compile": describe(self.compiling),
            "code": self.model_code,
        }
        for at, described in self.awaited.items():
            part, _, name = at.partition(".")
            config[part] = {**config[part], name: described} if name else described
        config.update(self.proposed)
        if self.class_name is not None:
            config["model"]["class"] = self.class_name
        return config

    def _warn_of_notebook(self) -> None:
        """Warn once if the class of the model is defined in a notebook: nothing can import it."""
        name = getattr(self.model_class, "__name__", "")
        lives_here = getattr(self.model_class, "__module__", "") == "__main__"
        if lives_here and in_notebook() and "notebook" not in self.warned:
            self.warned.add("notebook")
            warn(
                f"The class {name} is defined in a notebook. Another program loads the checkpoint "
                f"with NNHandler.load(..., model_class={name}), or, if the handler was made with "
                "save_model_code=True, with trust_code=True"
            )

    def callback_states(self) -> dict[str, Any]:
        """Internal. Return the class name and state of each callback, as plain data."""
        return {
            str(number): {"kind": type(callback).__name__, "state": callback.state_dict()}
            for number, callback in enumerate(self.callbacks)
        }

    def tensor_state(self) -> dict[str, Any]:
        """Internal. Return the part of the state that is loaded in place."""
        state: dict[str, Any] = {"model": self.model}
        others = self.optimizers
        main = others.pop(MAIN, None)
        if main is not None:
            state["optimizer"] = main
        if others:
            state["optimizers"] = others
        if isinstance(self.loss_fn, nn.Module) and self.loss_fn.state_dict():
            state["loss_fn"] = self.loss_fn
        elif self.loss_tensors is not None:
            state["loss_fn"] = self.loss_tensors
        return state

    def state(self) -> dict[str, Any]:
        """Internal. Return the state that a checkpoint holds."""
        if self.averaging:
            raise StateError(
                "A save inside ema_weights() would save the averages in place of the weights",
                remedy="save after the with block: the checkpoint holds both, and "
                "initialize_from_checkpoint(..., ema=True) reads the averages",
            )
        config = self.config()
        if self.rank == 0:
            warn_of_absent(config, self.warned)
            self._warn_of_notebook()
        position = self.position
        boundary = self.boundary or {"random": random_state(), "sums": None}
        boundary = {**boundary, "sums": _plain_sums(boundary["sums"])}
        state = self.tensor_state()
        schedulers = {name: one.state_dict() for name, one in self.schedulers.items()}
        if MAIN in schedulers:
            state["scheduler"] = schedulers.pop(MAIN)
        if schedulers:
            state["schedulers"] = schedulers
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
                "run_steps": self.run_steps,
                "validations": self.validations,
                "run_id": self.run_id,
                "history": self.history,
                "history_epochs": self.history_epochs,
                "rate": self.rates.get("lr", 0.0),
                "rates": self.rates,
                "seed": self.seed_value,
                "hyperparameters": self.hyperparameters,
                "stopped": self.stop_training,
            },
            "callbacks": self.callback_states(),
            "ranks": PerRank({**boundary, "epoch_random": position.random}),
            "config": config,
        }


def check_metric_name(name: Any) -> None:
    """Raise StateError for a name that no metric, term of the loss or logged value can have."""
    if not isinstance(name, str) or not name:
        raise StateError("Invalid name of a metric", expected="a str", actual=repr(name))
    if name in ("loss", "epoch", "step", "lr") or name.startswith(("val_", "lr_")):
        raise StateError(
            "The name of this metric is taken",
            expected="a name other than loss, epoch, step and lr, without the prefix val_ or lr_",
            actual=repr(name),
            remedy="give another name; in validation, the prefix val_ is added to it",
        )


def _plain_sums(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the state of EpochSums as plain data."""
    if state is None:
        return None
    metrics = state.get("metrics") or {}
    return {
        **state,
        "sums": {name: float(value) for name, value in state["sums"].items()},
        "metrics": {n: one if isinstance(one, dict) else one.plain() for n, one in metrics.items()},
    }
