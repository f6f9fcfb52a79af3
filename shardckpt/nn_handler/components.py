"""The setters of a handler's parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from shardckpt.errors import StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.callback import Callback, Hook, Metrics
from shardckpt.nn_handler.data import TrainData, ValData
from shardckpt.nn_handler.groups import Groups, grouped
from shardckpt.nn_handler.model_code import collect_code
from shardckpt.nn_handler.parallel import Buffers, Layout, Parallel, start, wrap
from shardckpt.nn_handler.random_state import seed_generators
from shardckpt.nn_handler.scheduling import Interval, Scheduler
from shardckpt.nn_handler.training_state import TrainingState

__all__ = ["Components", "check_compile"]


class Components(TrainingState):
    """The setters of a handler's parts, and what a load does with what it may not decide."""

    def __init__(
        self,
        model_class: Callable[..., nn.Module],
        device: str | torch.device | None = None,
        save_model_code: bool = False,
        *,
        parallel: Parallel = "auto",
        device_mesh: Any = None,
        tp_plan: Mapping[str, Any] | None = None,
        parallel_options: Mapping[str, Any] | None = None,
        buffers: Buffers = "rank0",
        **model_kwargs: Any,
    ) -> None:
        layout = start(
            parallel, device, device_mesh, tp_plan, options=parallel_options, buffers=buffers
        )
        super().__init__(layout=layout)
        self._save_code = save_model_code
        self.set_model(model_class, **model_kwargs)

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
        if not callable(model_class):
            raise StateError(
                "The model's class is not callable",
                expected="a class, or a function that makes the model",
                actual=repr(model_class)[:200],
            )
        self.model_class, self.model_kwargs = model_class, model_kwargs
        self.model = wrap(model_class(**model_kwargs), self.layout)
        self.wrapped_for = [p.requires_grad for p in self.module.parameters()]
        self.ema, self.probed = None, False
        self.frozen, self.compiling, self.class_name = [], None, None
        self.model_code = collect_code(model_class) if self._save_code else None

    def set_optimizer(
        self,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        *,
        groups: Groups | None = None,
        **options: Any,
    ) -> None:
        """Optimise the model's parameters that are not frozen, and those of the loss.

        `groups` gives some of them options of their own: a dict of name prefix -> options, or a
        list of dicts as torch has it, whose "params" are parameters, names or prefixes. A
        scheduler that was set before begins anew.
        """
        check_class(optimizer_class, torch.optim.Optimizer, "optimizer", "torch.optim.Adam, lr=0.1")
        self.make_optimizer(optimizer_class, groups, options)

    def make_optimizer(
        self, optimizer_class: Any, groups: Any, options: dict[str, Any], *, exact: bool = False
    ) -> None:
        """See set_optimizer; `exact`: the groups are all there are."""
        chosen, named = grouped(self.module, groups, self.loss_module, exact=exact)
        optimizer = optimizer_class(chosen, **options)
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise StateError(
                "This optimizer computes the loss several times a step, which train does not",
                expected="an optimizer whose step needs no closure",
                actual=type(optimizer).__name__,
            )
        self.optimizer = optimizer
        self.optimizer_recipe = {"class": optimizer_class, "groups": named, "options": options}
        if self.scheduler is not None:
            self.scheduler = self.scheduler.anew(optimizer)
            warn("The scheduler begins anew, with the new optimizer")
        self.rate = float(optimizer.param_groups[0]["lr"])

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
        check_class(scheduler_class, LRScheduler, "scheduler", "StepLR, step_size=10")
        if self.optimizer is None:
            raise StateError("A scheduler needs an optimizer", remedy="call set_optimizer first")
        self.scheduler = Scheduler(
            self.optimizer, scheduler_class, options, interval=interval, monitor=monitor
        )
        self.rate = float(self.optimizer.param_groups[0]["lr"])

    def set_loss_fn(self, loss_fn: Callable[..., Any]) -> None:
        """loss_fn(outputs, targets) -> a scalar tensor, the mean over the batch, or a dict of it as
        "loss" and of its terms by name, which the history gets too. Parameters of a loss that is a
        module are trained with the model's. Without a loss, that of the outputs is taken."""
        check_function(loss_fn, "loss", "set_loss_fn(nn.CrossEntropyLoss())")
        placed = isinstance(loss_fn, nn.Module) and self.device.type != "meta"
        if isinstance(loss_fn, nn.Module) and self.loss_tensors is not None:
            try:
                loss_fn.load_state_dict(self.loss_tensors.state_dict())
            except RuntimeError as error:
                warn(f"The loss does not take its saved tensors: {error}")
        former = self.loss_module
        self.loss_fn = loss_fn.to(self.device) if placed else loss_fn  # type: ignore[attr-defined]
        self.awaited.pop("loss_fn", None)
        self.loss_tensors = None
        loss = self.loss_module
        if loss is not None and self.parallel != "none" and self.device.type != "meta":
            for tensor in (*loss.parameters(), *loss.buffers()):
                dist.broadcast(tensor.data, 0)
        if (former or loss) and former is not loss and self.optimizer is not None:
            assert self.optimizer_recipe is not None
            recipe = self.optimizer_recipe
            groups = [
                {**group, "params": names}
                for group in recipe["groups"]
                if (names := [n for n in group["params"] if not n.startswith("loss_fn.")])
            ]
            if loss is not None:
                groups.append({"params": [f"loss_fn.{n}" for n, _ in loss.named_parameters()]})
            self.make_optimizer(recipe["class"], groups, recipe["options"], exact=True)

    def set_training_step(self, step: Callable[..., Any]) -> None:
        """step(handler, batch) -> the loss, for training and validation in place of the model and
        the loss function. Not collective.

        Args:
            step: Gets this handler and a batch on its device. It returns a scalar tensor, or a
                dict with it as "loss", terms by name, and for metrics "outputs" and "targets".
                The trainer does backward and the update. A step that returns None does both by
                itself. A checkpoint does not hold it: give it again after load.
        """
        check_function(step, "training step", "set_training_step(step)")
        self.training_step = step
        self.awaited.pop("own_step", None)

    def add_metric(self, name: str, metric: Any) -> None:
        """metric(outputs, targets) -> a number, the mean over the batch; for training and
        validation (as `val_<name>`). An object with update, compute and reset, as those of
        torchmetrics, takes in the batches of an epoch, and computes over all ranks at its end."""
        if not name or name in ("loss", "lr", "epoch", "step") or name.startswith("val_"):
            raise StateError("This name of a metric is taken", actual=repr(name))
        check_function(metric, "metric", f"add_metric({name!r}, metric)")
        self.metrics[name] = metric
        self.awaited.pop(f"metrics.{name}", None)

    def set_train_loader(self, data: Any, **loader_options: Any) -> None:
        """A Dataset with a DataLoader's options, a DataLoader, or any iterable of batches.

        A Dataset, and that of a plain DataLoader, is divided among the ranks; all else is used as
        it is: with its sampler, batch sampler, generator or class.
        """
        self.train_data = TrainData(data, loader_options, self.layout)

    def set_val_loader(self, data: Any, **loader_options: Any) -> None:
        """As set_train_loader; every sample is seen by one rank, once."""
        self.val_data = ValData(data, loader_options, self.layout)

    def add_callback(self, callback: Callback | Callable[[Any, Metrics], Any]) -> None:
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
        modules = dict(self.module.named_modules(remove_duplicate=False))
        module = modules.get(name)
        if module is None:
            raise StateError(
                "The model has no such module",
                expected=", ".join(filter(None, modules)),
                actual=name,
            )
        module.requires_grad_(not freeze)
        self.frozen = [n for n in self.frozen if n != name] + ([name] if freeze else [])
        self.wrap_again()

    def set_hyperparameters(self, **options: Any) -> None:
        """Change options of the optimizer in all its groups, such as lr and weight_decay, and keep
        its moments. Holds after a resume too: what a checkpoint says gives way. Not collective.

        A scheduler goes on with the new rate as its base.

        Raises:
            StateError: The optimizer has no such option.

        Example:
            >>> handler.set_optimizer(torch.optim.AdamW, lr=0.01)
            >>> handler.set_hyperparameters(lr=0.003)
        """
        self.hyperparameters.update(options)
        self.apply_hyperparameters()

    def remove_callback(self, callback: Callback | type[Callback]) -> None:
        """Remove a callback, or all of a class. Not collective.

        Raises:
            StateError: There is none.
        """
        kept = [
            c
            for c in self.callbacks
            if c is not callback and not (isinstance(callback, type) and isinstance(c, callback))
        ]
        if len(kept) == len(self.callbacks):
            raise StateError(
                "The handler does not have this callback",
                expected=", ".join(type(c).__name__ for c in self.callbacks) or "none is there",
                actual=repr(callback),
            )
        self.callbacks[:] = kept

    def compile_model(self, **options: Any) -> None:
        """torch.compile the model, in place: names of parameters stay as they are."""
        self.model.compile(**options)
        self.compiling = options
        self.proposed.pop("compile", None)

    def await_part(self, at: str, described: Any, tensors: nn.Module | None) -> None:
        """Note a loss or metric ("loss_fn", "metrics.<name>") that a checkpoint names and that is
        to be given before training; `tensors` holds those of a loss until then."""
        self.awaited[at] = described
        self.loss_tensors = tensors or self.loss_tensors

    def propose(self, part: str, options: Any) -> None:
        """Keep what a checkpoint says about "auto_saver" or "compile", until it is confirmed;
        StateError for options that can't be taken."""
        if part == "auto_saver":
            AutoSaver(**{**options, "resume": None})
        else:
            check_compile(options)
        self.proposed[part] = options

    @property
    def unconfirmed(self) -> list[str]:
        """What came with a checkpoint and does nothing before `confirm`: the auto-saver, callbacks
        that write files, the compilation of the model."""
        waiting = [f"{part}: {options}" for part, options in self.proposed.items()]
        return waiting + [
            f"{type(c).__name__}: {c.arguments}"
            for c in self.callbacks
            if c.writes_files and not c.confirmed
        ]

    def confirm(self) -> None:
        """Let all that is `unconfirmed` do as the checkpoint says. Not collective.

        Look at `unconfirmed` first, if you did not make the checkpoint: the auto-saver and the
        callbacks write to the paths that it names, and remove what their policies say.

        Example:
            >>> handler = NNHandler.load("models/final")
            >>> print(handler.unconfirmed)
            >>> handler.confirm()
        """
        saver, compiling = (self.proposed.pop(part, None) for part in ("auto_saver", "compile"))
        if saver is not None:
            self.auto_saver = AutoSaver(**{**saver, "resume": None})
        if compiling is not None:
            self.compile_model(**compiling)
        for callback in self.callbacks:
            callback.confirmed = True

    def adopt_code(self, code: dict[str, str] | None, class_name: Any) -> None:
        """Keep the source that came with a checkpoint, and the name of a class made by it."""
        self.model_code, self.class_name = code, class_name

    def use_device(self, device: torch.device) -> None:
        """Send inputs to another device."""
        self.layout = Layout(mode="none", device=device)


def check_class(given: Any, base: type, what: str, example: str) -> None:
    """Raise StateError for anything that can't make an optimizer or a scheduler."""
    if isinstance(given, base) or not callable(given):
        raise StateError(
            f"The class of the {what} was expected",
            expected=f"a class and its arguments, as in set_{what}({example})",
            actual=f"an instance of {type(given).__name__}",
            remedy=f"give the class: set_{what}({type(given).__name__}, ...)"
            if isinstance(given, base)
            else "give the class itself",
        )


def check_function(given: Any, what: str, example: str) -> None:
    """Raise StateError for a class in place of an instance, or what can't be called."""
    if isinstance(given, type) or not (callable(given) or hasattr(given, "update")):
        name = given.__name__ if isinstance(given, type) else repr(given)[:100]
        raise StateError(
            f"A {what} must be an instance or a function",
            expected=f"as in {example}",
            actual=f"the class {name}" if isinstance(given, type) else name,
            remedy=f"make an instance: {name}(...)" if isinstance(given, type) else None,
        )


_COMPILING: dict[str, tuple[Any, ...]] = {
    "fullgraph": (True, False),
    "dynamic": (True, False, None),
    "disable": (True, False),
    "backend": ("inductor", "eager", "aot_eager"),
    "mode": (
        None,
        "default",
        "reduce-overhead",
        "max-autotune",
        "max-autotune-no-cudagraphs",
    ),
}


def check_compile(options: dict[str, Any]) -> None:
    """Raise StateError for options of torch.compile that a checkpoint must not choose: a backend
    by name is imported, and `options` can name the compiler that is run."""
    for name, value in options.items():
        if value not in _COMPILING.get(name, ()):
            raise StateError(
                "A checkpoint may not choose this option of torch.compile",
                expected=f"one of {_COMPILING.get(name) or sorted(_COMPILING)}",
                actual=f"{name}={value!r}"[:200],
            )
