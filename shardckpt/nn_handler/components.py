"""Components: the setters of a handler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from shardckpt.errors import ShardckptError, StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.batch import on_device
from shardckpt.nn_handler.callback import Callback, Hook, Metrics
from shardckpt.nn_handler.data import TrainData, ValData
from shardckpt.nn_handler.groups import Choice, Groups, group_names, grouped
from shardckpt.nn_handler.model_code import collect_code
from shardckpt.nn_handler.optimization import MAIN, Optimization
from shardckpt.nn_handler.parallel import Buffers, Layout, Parallel, join_ranks, wrap
from shardckpt.nn_handler.scheduling import Interval, Scheduler
from shardckpt.nn_handler.training_state import TrainingState, check_metric_name
from shardckpt.state.random_state import seed_generators

__all__ = ["Components", "check_compile"]


class Components(TrainingState):
    """The setters of a handler, and what a load leaves to be given or confirmed."""

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
        if not isinstance(save_model_code, bool):  # NNHandler(Net, "cpu", 32)
            raise StateError(
                "The arguments of the model must be passed by name",
                expected="a bool as save_model_code, the third argument",
                actual=repr(save_model_code)[:200],
                remedy='write NNHandler(Net, device="cpu", width=32)',
            )
        layout = join_ranks(
            parallel, device, device_mesh, tp_plan, options=parallel_options, buffers=buffers
        )
        super().__init__(layout=layout)
        self._save_code = save_model_code
        self.set_model(model_class, **model_kwargs)

    def set_model(self, model_class: Callable[..., nn.Module], **model_kwargs: Any) -> None:
        """Create another model, before set_optimizer. Collective.

        Args:
            model_class: The class, or a function that creates the model.
            model_kwargs: The arguments of the class.

        Raises:
            StateError: An optimizer exists already, or `model_class` is an instance.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_model(nn.Linear, in_features=4, out_features=3)
            >>> handler.model.out_features
            3
        """
        if self.optimizations:
            raise StateError(
                "An optimizer holds the parameters of the current model",
                remedy="call set_model before set_optimizer",
            )
        if isinstance(model_class, nn.Module):
            raise StateError(
                "A model was given, where its class was expected",
                actual=type(model_class).__name__,
                remedy="give the class and its arguments, as in NNHandler(Net, width=32): "
                "a checkpoint holds them, and load creates the model from them",
            )
        if not callable(model_class):
            raise StateError(
                "The model's class is not callable",
                expected="a class, or a function that creates the model",
                actual=repr(model_class)[:200],
            )
        self.model_class, self.model_kwargs = model_class, model_kwargs
        self.model = wrap(model_class(**model_kwargs), self.layout)
        self.wrapped_for = [(id(p), p.requires_grad) for p in self.module.parameters()]
        self.ema, self.probed = None, False
        self.frozen, self.kept_eval, self.compiling, self.class_name = [], [], None, None
        self.model_code = collect_code(model_class) if self._save_code else None

    def set_optimizer(
        self,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        *,
        name: str = MAIN,
        params: Choice | Iterable[Choice] | None = None,
        groups: Groups | None = None,
        **options: Any,
    ) -> None:
        """Set an optimizer. Not collective.

        Optimizers with different names share the parameters of the model. Each of them steps after
        every backward pass, unless a training step of your own calls `update`. An optimizer of the
        same name is replaced, and its scheduler starts again.

        A parameter is chosen by its name, a prefix of names, a pattern such as `"*.bias"`, the
        tensor itself, or a function of (name, parameter).

        Args:
            optimizer_class: A class such as torch.optim.AdamW.
            name: The name of the optimizer. The names appear in `optimizers` and in checkpoints.
            params: The parameters of this optimizer. By default all that need gradients and that
                no other optimizer holds, with those of the loss.
            groups: Groups with options of their own: a dict from a choice of parameters to options,
                or a list of dicts with "params" and options. Parameters in no group form the first
                group.
            options: The arguments of the class.

        Raises:
            StateError: The arguments are invalid, or two optimizers would hold one parameter.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_optimizer(torch.optim.Muon, params="weight", lr=0.02)
            >>> handler.set_optimizer(torch.optim.AdamW, name="rest", lr=0.001)
            >>> [group["params"][0].shape for group in handler.optimizers["rest"].param_groups]
            [torch.Size([2])]
        """
        check_class(optimizer_class, torch.optim.Optimizer, "optimizer", "torch.optim.Adam, lr=0.1")
        if not isinstance(name, str) or not name.isidentifier():
            raise StateError("Invalid name of an optimizer", expected="a word", actual=repr(name))
        self.make_optimizer(optimizer_class, groups, options, name=name, params=params)

    def make_optimizer(
        self,
        optimizer_class: Any,
        groups: Any,
        options: dict[str, Any],
        *,
        name: str = MAIN,
        params: Any = None,
        exact: bool = False,
    ) -> None:
        """Internal. Set an optimizer; `exact`: leave out parameters that are in no group."""
        loss = self.loss_module
        held = {
            parameter: other
            for other, one in self.optimizations.items()
            if other != name
            for names in group_names(one.optimizer, self.module, loss)
            for parameter in names
        }
        chosen, named = grouped(self.module, groups, loss, params=params, held=held, exact=exact)
        with from_arguments("optimizer", optimizer_class):
            optimizer = optimizer_class(chosen, **options)
        if not hasattr(optimizer, "param_groups"):
            raise StateError(
                "The class of the optimizer made something else",
                expected="an object with param_groups, as optimizers of torch are",
                actual=type(optimizer).__name__,
            )
        if not exact:
            _warn_of_unknown(optimizer, named)
        recipe = {"class": optimizer_class, "groups": named, "options": options}
        former = self.optimizations.get(name)
        made = Optimization(optimizer=optimizer, recipe=recipe)
        if former is not None and former.scheduler is not None:
            made.scheduler = former.scheduler.for_optimizer(optimizer)
            warn("The scheduler starts again with the new optimizer")
        self.optimizations[name] = made
        self.note_rates()

    def set_scheduler(
        self,
        scheduler_class: Callable[..., Any],
        *,
        optimizer: str = MAIN,
        interval: Interval | None = None,
        monitor: str = "val_loss",
        **options: Any,
    ) -> None:
        """Set the learning-rate scheduler of an optimizer. Not collective.

        The option `schedulers` of SequentialLR and ChainedScheduler is a list of pairs: a class and
        its options.

        Args:
            scheduler_class: A class such as torch.optim.lr_scheduler.StepLR.
            optimizer: The name of the optimizer.
            interval: Step after each "epoch", or after each "step" of the optimizer, which is the
                default of OneCycleLR and CyclicLR.
            monitor: The metric that ReduceLROnPlateau watches.
            options: The arguments of the class.

        Raises:
            StateError: The arguments are invalid, or the optimizer does not exist.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_optimizer(torch.optim.SGD, lr=0.1)
            >>> handler.set_scheduler(torch.optim.lr_scheduler.StepLR, step_size=10)
            >>> handler.scheduler.interval
            'epoch'
        """
        check_class(scheduler_class, LRScheduler, "scheduler", "StepLR, step_size=10")
        one = self._optimization(optimizer)
        with from_arguments("scheduler", scheduler_class):
            one.scheduler = Scheduler(
                one.optimizer, scheduler_class, options, interval=interval, monitor=monitor
            )
        self.note_rates()

    def set_loss_fn(
        self, loss_fn: Callable[..., Any], *, pass_epoch_to_loss: bool = False, **arguments: Any
    ) -> None:
        """Set the loss: `loss_fn(outputs, targets)`. Collective if it is a module.

        Without a loss function, training uses the `loss` of the model's outputs. Parameters of a
        loss module are trained with those of the model.

        Args:
            loss_fn: Returns a scalar tensor, the mean over the batch, or a dict with that as "loss"
                and with the terms of the loss, which appear in the history.
            pass_epoch_to_loss: Also pass `epoch=`, the number of completed epochs.
            arguments: More keyword arguments of each call. Tensors and modules among them are moved
                to the device.

        Raises:
            StateError: `loss_fn` is a class, or is not callable.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_loss_fn(nn.functional.cross_entropy, label_smoothing=0.1)
        """
        check_function(loss_fn, "loss", "set_loss_fn(nn.CrossEntropyLoss())")
        placed = isinstance(loss_fn, nn.Module) and self.device.type != "meta"
        if isinstance(loss_fn, nn.Module) and self.loss_tensors is not None:
            try:
                loss_fn.load_state_dict(self.loss_tensors.state_dict())
            except RuntimeError as error:
                warn(f"The loss does not take its saved tensors: {error}")
        former = self.loss_module
        self.loss_fn = loss_fn.to(self.device) if placed else loss_fn  # type: ignore[attr-defined]
        if arguments or pass_epoch_to_loss or "loss_fn" not in self.awaited:
            self.loss_arguments = on_device(arguments, self.device)
            self.passes_epoch = pass_epoch_to_loss
        self.awaited.pop("loss_fn", None)
        self.loss_tensors = None
        loss = self.loss_module
        if loss is not None and self.parallel != "none" and self.device.type != "meta":
            models = {id(buffer) for buffer in self.module.buffers()}
            buffers = [buffer for buffer in loss.buffers() if id(buffer) not in models]
            for tensor in (*self.loss_parameters(), *buffers):
                dist.broadcast(tensor.data, 0)
        if (former or loss) and former is not loss and MAIN in self.optimizations:
            self._optimize_loss(loss)

    def _optimize_loss(self, loss: nn.Module | None) -> None:
        """Replace the parameters of the former loss in the main optimizer."""
        recipe = self.optimizations[MAIN].recipe
        groups = [
            {**group, "params": names}
            for group in recipe["groups"]
            if (names := [n for n in group["params"] if not n.startswith("loss_fn.")])
        ]
        if loss is not None:
            groups.append({"params": self.loss_parameters()})
        self.make_optimizer(recipe["class"], groups, recipe["options"], exact=True)

    def set_training_step(self, step: Callable[..., Any]) -> None:
        """Set a function that replaces the model call and the loss. Not collective.

        The step is used in training and in validation. A checkpoint does not hold it: set it again
        after a load.

        Args:
            step: Called with the handler and a batch on its device. It returns a scalar tensor, or
                a dict with that as "loss", with the terms of the loss by name and, for metrics,
                "outputs" and "targets". Training then runs the backward pass and the optimizers.
                A step that calls `handler.update` itself returns None.

        Raises:
            StateError: `step` is not callable.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> def step(handler, batch):
            ...     return nn.functional.mse_loss(handler.model(batch[0]), batch[1])
            >>> handler.set_training_step(step)
        """
        check_function(step, "training step", "set_training_step(step)")
        self.training_step = step
        self.awaited.pop("own_step", None)

    def add_metric(self, name: str, metric: Any, *, whole_epoch: bool = False) -> None:
        """Add a metric of training and, as `val_<name>`, of validation. Not collective.

        Args:
            name: The name in the history.
            metric: A function of (outputs, targets) that returns the mean over a batch. Or an
                object with `update`, `compute` and `reset`, such as those of torchmetrics. If such
                an object has no method `sync`, its values are averaged over the ranks.
            whole_epoch: Call the function once, with all outputs and targets of the epoch and of
                all ranks, on the CPU. For metrics that are not means of batches, such as F1.

        Raises:
            StateError: The name is taken, or `metric` is not callable.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> def correct(outputs, targets):
            ...     return (outputs.argmax(1) == targets).float().mean()
            >>> handler.add_metric("accuracy", correct)
        """
        check_metric_name(name)
        check_function(metric, "metric", f"add_metric({name!r}, metric)")
        if whole_epoch and not callable(metric):
            raise StateError(
                "whole_epoch=True needs a function of (outputs, targets)",
                actual=type(metric).__name__,
            )
        self.metrics[name] = metric
        self.whole_epoch = [n for n in self.whole_epoch if n != name]
        self.whole_epoch += [name] if whole_epoch else []
        self.awaited.pop(f"metrics.{name}", None)

    def set_train_loader(self, data: Any, **loader_options: Any) -> None:
        """Set the data to train on. Not collective.

        A Dataset, and the dataset of a plain DataLoader, is divided among the ranks. Any other
        loader is used as it is, with its sampler, batch sampler, generator and class.

        Args:
            data: A Dataset, a DataLoader, or any iterable of batches.
            loader_options: The arguments of a DataLoader, if `data` is a Dataset. `batch_size` is
                that of each rank.

        Raises:
            StateError: The data or the options are invalid.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> dataset = TensorDataset(torch.randn(8, 4), torch.randn(8, 2))
            >>> handler.set_train_loader(dataset, batch_size=4, shuffle=True)
        """
        self.train_data = TrainData(data, loader_options, self.layout)

    def set_val_loader(self, data: Any, **loader_options: Any) -> None:
        """Set the data to validate on. Not collective.

        Each sample of a Dataset is used by one rank, once.

        Args:
            data: See set_train_loader.
            loader_options: See set_train_loader.

        Raises:
            StateError: The data or the options are invalid.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from torch.utils.data import TensorDataset
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_loss_fn(nn.MSELoss())
            >>> dataset = TensorDataset(torch.ones(9, 4), torch.ones(9, 2))
            >>> handler.set_val_loader(dataset, batch_size=4)
            >>> list(handler.evaluate())
            ['loss']
        """
        self.val_data = ValData(data, loader_options, self.layout)

    def add_callback(self, callback: Callback | Callable[[Any, Metrics], Any]) -> None:
        """Add a callback. Not collective.

        Args:
            callback: A Callback, or a function of (handler, metrics) to call after each epoch.

        Raises:
            StateError: `callback` is a class, or neither a Callback nor callable.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> from shardckpt.nn_handler import EarlyStopping
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.add_callback(EarlyStopping("val_loss", patience=3))
        """
        if isinstance(callback, type) or not callable(callback) | isinstance(callback, Callback):
            raise StateError(
                "Invalid callback",
                expected="an instance of Callback, or a function",
                actual=repr(callback),
            )
        if isinstance(callback, Callback):
            _warn_of_hooks(callback)
        self.callbacks.append(callback if isinstance(callback, Callback) else Hook(callback))

    def remove_callback(self, callback: Callback | type[Callback]) -> None:
        """Remove a callback. Not collective.

        Args:
            callback: The callback, or a class whose instances are all removed.

        Raises:
            StateError: The handler does not have the callback.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> from shardckpt.nn_handler import EarlyStopping
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.add_callback(EarlyStopping("val_loss"))
            >>> handler.remove_callback(EarlyStopping)
            >>> handler.callbacks
            []
        """
        kept = [
            c
            for c in self.callbacks
            if c is not callback and not (isinstance(callback, type) and isinstance(c, callback))
        ]
        if len(kept) == len(self.callbacks):
            raise StateError(
                "The handler does not have this callback",
                expected=", ".join(type(c).__name__ for c in self.callbacks) or "no callback",
                actual=repr(callback),
            )
        self.callbacks[:] = kept

    def seed(self, seed: int) -> None:
        """Seed the random numbers and the order of the data. Not collective.

        Args:
            seed: Rank r seeds its generators of torch, numpy and Python with seed + r.

        Raises:
            StateError: `seed` is not an int.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.seed(7)
        """
        if type(seed) is not int or not -(1 << 63) <= seed < 1 << 63:
            raise StateError("Invalid seed", expected="an int of 64 bits", actual=repr(seed))
        self.seed_value = seed
        seed_generators(self.seed_value + self.layout.data[0])

    def freeze_module(self, name: str, *, freeze: bool = True) -> None:
        """Stop training a submodule, and keep it in evaluation mode. Collective under DDP.

        Args:
            name: The name of the submodule.
            freeze: False trains it again. The optimizer must hold its parameters: call
                set_optimizer again, or `handler.optimizer.add_param_group`.

        Raises:
            StateError: The model has no such submodule.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Transformer, d_model=8, nhead=2, batch_first=True)
            >>> handler.freeze_module("encoder")
            >>> handler.count_parameters(trainable=True) < handler.count_parameters()
            True
        """
        self._submodule(name).requires_grad_(not freeze)
        self.frozen = [n for n in self.frozen if n != name] + ([name] if freeze else [])
        self.wrap_again()

    def keep_eval_on_module(self, name: str, *, keep: bool = True) -> None:
        """Keep a submodule in evaluation mode while its parameters are trained. Not collective.

        For a BatchNorm whose running means must not change, for example.

        Args:
            name: The name of the submodule.
            keep: False lets it follow the mode of the model again.

        Raises:
            StateError: The model has no such submodule.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Transformer, d_model=8, nhead=2, batch_first=True)
            >>> handler.keep_eval_on_module("encoder.norm")
        """
        self._submodule(name)
        self.kept_eval = [n for n in self.kept_eval if n != name] + ([name] if keep else [])

    def _submodule(self, name: str) -> nn.Module:
        modules: dict[str, nn.Module] = dict(self.module.named_modules(remove_duplicate=False))
        if not isinstance(name, str) or name not in modules:
            raise StateError(
                "The model has no such module",
                expected=", ".join(filter(None, modules)),
                actual=repr(name)[:200],
            )
        return modules[name]

    def set_hyperparameters(self, *, optimizer: str = MAIN, **options: Any) -> None:
        """Change options of an optimizer and keep its moments. Not collective.

        The change also holds after a resume: it replaces the options of the checkpoint, unless the
        run that saved it had made the same change. A scheduler continues with a new rate as its
        base, OneCycleLR with it as its largest rate.

        Args:
            optimizer: The name of the optimizer.
            options: Options of the optimizer such as `lr` and `weight_decay`, for all groups.

        Raises:
            StateError: The handler lacks the optimizer, or the optimizer lacks an option.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.set_optimizer(torch.optim.AdamW, lr=0.01)
            >>> handler.set_hyperparameters(lr=0.003)
            >>> handler.optimizer.param_groups[0]["lr"]
            0.003
        """
        self._optimization(optimizer).check_options(options)
        self.hyperparameters.setdefault(optimizer, {}).update(options)
        self.apply_hyperparameters()

    def compile_model(self, **options: Any) -> None:
        """Compile the model in place with torch.compile. Not collective.

        The names of parameters do not change.

        Args:
            options: The arguments of torch.compile.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.compile_model(backend="eager")
        """
        self.model.compile(**options)
        self.compiling = options
        self.proposed.pop("compile", None)

    def await_part(self, at: str, described: Any, tensors: nn.Module | None) -> None:
        """Internal. Note a part that a checkpoint names and that must be given before training.

        `at` is "loss_fn", "own_step" or "metrics.<name>". `tensors` holds those of the loss.
        """
        self.awaited[at] = described
        self.loss_tensors = tensors or self.loss_tensors

    def propose(self, part: str, options: Any) -> None:
        """Internal. Keep the options of "auto_saver" or "compile" until they are confirmed.

        Raises StateError for invalid options.
        """
        if part == "auto_saver":
            AutoSaver(**{**options, "resume": None})
        else:
            check_compile(options)
        self.proposed[part] = options

    @property
    def unconfirmed(self) -> list[str]:
        """The parts of a loaded checkpoint that are inactive until `confirm` is called.

        The auto-saver, callbacks that write files, and the compilation of the model.
        """
        waiting = [f"{part}: {options}" for part, options in self.proposed.items()]
        return waiting + [
            f"{type(c).__name__}: {c.constructor_arguments}"
            for c in self.callbacks
            if c.writes_files and not c.confirmed
        ]

    def confirm(self) -> None:
        """Activate all that is `unconfirmed`. Not collective.

        Look at `unconfirmed` first if you did not save the checkpoint: the auto-saver and the
        callbacks write to the paths in it, and remove what their policies say.

        Example:
            >>> from torch import nn
            >>> from shardckpt import NNHandler
            >>> handler = NNHandler(nn.Linear, in_features=4, out_features=2)
            >>> handler.auto_save(save_path="runs")
            >>> handler.save("models/final")
            >>> loaded = NNHandler.load("models/final")
            >>> len(loaded.unconfirmed)
            1
            >>> loaded.confirm()
            >>> loaded.unconfirmed
            []
        """
        saver, compiling = (self.proposed.pop(part, None) for part in ("auto_saver", "compile"))
        if saver is not None:
            self.auto_saver = AutoSaver(**{**saver, "resume": None})
        if compiling is not None:
            self.compile_model(**compiling)
        for callback in self.callbacks:
            callback.confirmed = True

    def adopt_code(self, code: dict[str, str] | None, class_name: Any) -> None:
        """Internal. Keep the source in a checkpoint, and the name of a class created from it."""
        self.model_code, self.class_name = code, class_name

    def use_device(self, device: torch.device) -> None:
        """Internal. Send inputs to another device."""
        self.layout = Layout(mode="none", device=device)


def _warn_of_hooks(callback: Callback) -> None:
    """Warn of methods with the name of a hook of another library, which are never called."""
    hooks = [name for name in dir(Callback) if name.startswith("on_")]
    unknown = [n for n in dir(type(callback)) if n.startswith("on_") and n not in hooks]
    if unknown:
        warn(
            f"{type(callback).__name__} has methods that are not hooks and are never called: "
            f"{', '.join(unknown)}. The hooks are {', '.join(hooks)}"
        )


def _warn_of_unknown(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Warn of options of groups that the optimizer does not have, and that torch accepts."""
    known = {*optimizer.defaults, "params", "name", "initial_lr"}
    unknown = dict.fromkeys(name for group in groups for name in group if name not in known)
    if unknown and optimizer.defaults:
        warn(
            f"{type(optimizer).__name__} does not use these options of a group: "
            f"{', '.join(unknown)}. Its options are {', '.join(sorted(optimizer.defaults))}"
        )


@contextmanager
def from_arguments(what: str, cls: Any) -> Iterator[None]:
    """Turn an error of a constructor about its arguments into a StateError."""
    try:
        yield
    except ShardckptError:
        raise
    except (TypeError, ValueError) as error:
        raise StateError(
            f"The {what} does not take these arguments",
            expected=f"the arguments of {getattr(cls, '__name__', cls)}",
            actual=f"{type(error).__name__}: {error}".partition("\n")[0],
        ) from error


def check_class(given: Any, base: type, what: str, example: str) -> None:
    """Raise StateError unless `given` can create an optimizer or a scheduler."""
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
    """Raise StateError for a class in place of an instance, and for what can't be called."""
    if isinstance(given, type) or not (callable(given) or hasattr(given, "update")):
        name = given.__name__ if isinstance(given, type) else repr(given)[:100]
        raise StateError(
            f"A {what} must be an instance or a function",
            expected=f"as in {example}",
            actual=f"the class {name}" if isinstance(given, type) else name,
            remedy=f"create an instance: {name}(...)" if isinstance(given, type) else None,
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
    """Raise StateError for options of torch.compile that a checkpoint must not choose.

    torch imports a backend by its name, and `options` can name a compiler to run.
    """
    for name, value in options.items():
        if value not in _COMPILING.get(name, ()):
            raise StateError(
                "A checkpoint may not choose this option of torch.compile",
                expected=f"one of {_COMPILING.get(name) or sorted(_COMPILING)}",
                actual=f"{name}={value!r}"[:200],
            )
