"""Loading a handler: create it from a checkpoint, or fill one whose parts are set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from warnings import catch_warnings, simplefilter

import msgspec
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardckpt import api
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.resolve import alone, operation
from shardckpt.errors import CheckpointError, LoadMismatchError, StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.batch import concatenated_batches, on_device
from shardckpt.nn_handler.bounds import Bounds
from shardckpt.nn_handler.callback import Callback
from shardckpt.nn_handler.components import Components
from shardckpt.nn_handler.config_differences import (
    check_components,
    optimizers_of,
    own_parts,
    place_of,
    warn_of_loss,
    warn_of_options,
)
from shardckpt.nn_handler.data import Position
from shardckpt.nn_handler.ema import EMA
from shardckpt.nn_handler.handler_source import HandlerSource, open_handler
from shardckpt.nn_handler.initializing import skipped_entries, warn_of_skipped, with_remedy
from shardckpt.nn_handler.model_code import class_of_code
from shardckpt.nn_handler.objects import Given, NameResolver, making
from shardckpt.nn_handler.optimization import MAIN
from shardckpt.nn_handler.parallel import Buffers, Parallel
from shardckpt.nn_handler.placement import place
from shardckpt.nn_handler.saved import (
    CallbackState,
    Config,
    OwnState,
    Saved,
    SavedProgress,
    Scaler,
    Sums,
    check_random,
    checked,
)
from shardckpt.nn_handler.trust import Slot
from shardckpt.plan.device_map import DeviceMap
from shardckpt.state.markers import PerRank
from shardckpt.state.mismatches import Mismatches
from shardckpt.state.module_state import canonical_names
from shardckpt.state.random_state import random_state, seed_generators, set_random_state
from shardckpt.torch_compat import child_names

__all__ = ["HandlerLoadOptions", "load_handler", "restore", "restore_tensors"]

_CREATED = (
    'give the model of the checkpoint: model_class=..., or objects={"model.kwargs": {...}}; '
    "strict=False loads what fits"
)
_RESTORED = (
    "create the model with the arguments that it had when this was saved, or take what fits with "
    "NNHandler.initialize_from_checkpoint(..., strict=False)"
)
_FUNCTIONS = ("loss_fn", "loss_arguments", "metrics")  # resolved when the model exists


@dataclass(frozen=True, kw_only=True)
class HandlerLoadOptions:
    """The arguments of NNHandler.load."""

    device: str | torch.device | None
    device_map: DeviceMap
    strict: bool
    skip_optimizer: bool
    skip_scheduler: bool
    skip_history: bool
    skip_callbacks: bool
    skip_ema: bool
    parallel: Parallel
    device_mesh: Any
    tp_plan: Mapping[str, Any] | None
    parallel_options: Mapping[str, Any] | None
    buffers: Buffers
    model_class: Callable[..., nn.Module] | None
    loss_fn: Callable[..., Any] | None
    metrics: Mapping[str, Callable[..., Any]] | None
    objects: Mapping[str, Any] | None
    trust_code: bool
    confirm: bool

    @property
    def placed(self) -> bool:
        """Whether the handler is for inference on the devices of a device map."""
        return self.device_map is not None

    @cached_property
    def given(self) -> dict[str, Any]:
        """The objects of the caller by their place in the checkpoint."""
        for name, value in (("objects", self.objects), ("metrics", self.metrics)):
            if not isinstance(value, Mapping | None):
                raise StateError(
                    f"Invalid {name} for load", expected="a dict", actual=repr(value)[:200]
                )
        if not (self.model_class is None or callable(self.model_class)):
            raise StateError(
                "The model's class is not callable",
                expected="a class, or a function that creates the model",
                actual=repr(self.model_class)[:200],
            )
        named = {"model.class": self.model_class, "loss_fn": self.loss_fn}
        metrics = {f"metrics.{name}": metric for name, metric in (self.metrics or {}).items()}
        chosen = {at: value for at, value in named.items() if value is not None}
        return {**(self.objects or {}), **metrics, **chosen}

    @cached_property
    def skip(self) -> set[str]:
        """The parts of the checkpoint to leave out."""
        skipped = {
            "optimizer": self.skip_optimizer,
            "scheduler": self.skip_scheduler or self.skip_optimizer,
            "history": self.skip_history,
            "callbacks": self.skip_callbacks,
            "ema": self.skip_ema,
        }
        return {part for part, skip in skipped.items() if skip}

    def takes(self, part: str) -> bool:
        """Whether to load a part of the checkpoint."""
        left_out = self.placed and part in ("optimizer", "scheduler")
        return part not in self.skip and not left_out


def load_handler(
    handler_class: type[Components], path: str, options: HandlerLoadOptions
) -> Components:
    """Create a handler. Collective, except with a device map. See NNHandler.load."""
    with alone() if options.device_map is not None else nullcontext():
        return _load(handler_class, path, options)


def _load(handler_class: type[Components], path: str, options: HandlerLoadOptions) -> Components:
    source = open_handler(path)
    saved = source.values()
    config = saved.config
    bounds = Bounds(lambda: list(source.shapes.values()), path=path)
    names = NameResolver(options.given, bounds, path=path)
    _check_options(config, options, path)
    with making("config", path):
        parts = _resolved(names, config, options)
    handler = _with_model(handler_class, names, parts, source, options)
    handler.adopt_code(config.code, config.model.class_name if options.trust_code else None)
    names.own_part = lambda name: handler.own_parts().get(name)
    if options.strict:
        _check_names(handler, source)
    _set_parts(handler, names, parts, source, config, options)
    restore(handler, source, saved, strict=options.strict, skip=options.skip, placed=options.placed)
    names.open()
    if options.confirm:
        handler.confirm()
    return handler


def _resolved(names: NameResolver, config: Config, options: HandlerLoadOptions) -> dict[str, Any]:
    """Resolve the names of all parts and their arguments, before anything is created.

    Raises one CheckpointError for all names that do not resolve.
    """
    model = config.model
    parts: dict[str, Any] = {"model.kwargs": names.resolve(model.kwargs, "model.kwargs")}
    if options.trust_code and "model.class" not in options.given:
        name = str(model.class_name.get("shardckpt.import", ""))
        parts["model.class"] = Given(class_of_code(config.code or {}, name, path=names.path))
    else:
        parts["model.class"] = names.resolve(model.class_name, "model.class", Slot.MODEL)
    for name, saved in optimizers_of(config).items():
        for part, slot in (("optimizer", Slot.OPTIMIZER), ("scheduler", Slot.SCHEDULER)):
            found, at = getattr(saved, part), place_of(name, part)
            if found is not None and options.takes(part):
                parts[f"{at}.class"] = names.resolve(found.class_name, f"{at}.class", slot)
                parts[f"{at}.options"] = names.resolve(found.options, f"{at}.options")
        if options.takes("optimizer"):
            at = f"{place_of(name, 'optimizer')}.groups"
            parts[at] = names.resolve(saved.optimizer.groups, at)
    if options.takes("callbacks"):
        for number, callback in enumerate(config.callbacks):
            at = f"callbacks.{number}"
            parts[at] = names.given_at(at) or (
                names.resolve(callback.class_name, f"{at}.class", Slot.CALLBACK),
                names.resolve(callback.args, f"{at}.args"),
                names.resolve(callback.kwargs, f"{at}.kwargs"),
            )
    names.raise_missing(_unused(names, options, later=_FUNCTIONS))
    return parts


def _check_options(config: Config, options: HandlerLoadOptions, path: str) -> None:
    """Raise StateError if the caller gives an option that the saved state would replace."""
    for name, saved in optimizers_of(config).items():
        for part, found in (("optimizer", saved.optimizer), ("scheduler", saved.scheduler)):
            for option, value in found.options.items() if found is not None else ():
                at = f"{place_of(name, part)}.options.{option}"
                if at not in options.given or isinstance(value, (dict, list, tuple)):
                    continue
                raise StateError(
                    "objects= can't change this option: the state in the checkpoint replaces it",
                    path=path,
                    tensor=at,
                    expected=repr(value)[:200],
                    actual=repr(options.given[at])[:200],
                    remedy=f"after load call handler.set_hyperparameters({option}=...)"
                    if part == "optimizer"
                    else "load with skip_scheduler=True, and then call set_scheduler",
                )


def _with_model(
    handler_class: type[Components],
    names: NameResolver,
    parts: dict[str, Any],
    source: HandlerSource,
    options: HandlerLoadOptions,
) -> Components:
    """Create a handler with its model, without the saved weights. Collective."""
    chosen = names.make(parts["model.class"], "model.class")
    kwargs = names.make(parts["model.kwargs"], "model.kwargs")
    given = "model.class" in options.given
    if isinstance(chosen, nn.Module):
        raise StateError(
            "A model was given, where its class was expected",
            actual=type(chosen).__name__,
            remedy="give the class: model_class=Net",
        )

    def make() -> nn.Module:
        with making("model", source.path):
            made = names.bounds.construct(chosen, (), kwargs, given=given)
            if not isinstance(made, nn.Module):
                raise TypeError(f"an nn.Module expected, not {type(made).__name__}")
            return _as_saved(made, source)

    if not options.placed:
        handler = handler_class(
            make,
            options.device,
            parallel=options.parallel,
            device_mesh=options.device_mesh,
            tp_plan=options.tp_plan,
            parallel_options=options.parallel_options,
            buffers=options.buffers,
        )
    else:
        with torch.device("meta"):
            handler = handler_class(make, "meta", parallel="none")
        inputs = place(
            handler.model,
            make,
            source.path,
            source.storage,
            device_map=options.device_map,
            strict=options.strict,
        )
        handler.use_device(inputs)
        handler.model.eval()
    handler.model_class, handler.model_kwargs = chosen, kwargs
    return handler


def _as_saved(module: nn.Module, source: HandlerSource) -> nn.Module:
    """Give the tensors of a model the shapes and the floating-point dtypes that were saved.

    Only lazy tensors have no shape yet.
    """
    names = canonical_names(module)
    tensors: list[tuple[str, Any]] = [*module.named_parameters(), *module.named_buffers()]
    for raw, tensor in tensors:
        name = f"model.{names.get(raw)}"
        if name not in source.shapes:
            continue
        if is_lazy(tensor):
            tensor.materialize(source.shapes[name])
        dtype = source.dtypes[name]
        if tensor.is_floating_point() and dtype.is_floating_point:
            tensor.data = tensor.data.to(dtype)
    return module


def _set_parts(
    handler: Components,
    names: NameResolver,
    parts: dict[str, Any],
    source: HandlerSource,
    config: Config,
    options: HandlerLoadOptions,
) -> None:
    made = {
        at: names.make(tree, at)
        for at, tree in parts.items()
        if not at.startswith(("model.", "callbacks."))
    }
    _set_trained(handler, config, source.path)
    _set_functions(handler, names, source, config, options)
    for name, saved in optimizers_of(config).items():
        at, scheduler_at = place_of(name, "optimizer"), place_of(name, "scheduler")
        if f"{at}.class" in made:
            with making(at, source.path):
                _check_loss(handler, made[f"{at}.groups"], source.path)
                handler.make_optimizer(
                    made[f"{at}.class"],
                    made[f"{at}.groups"],
                    made[f"{at}.options"],
                    name=name,
                    exact=True,
                )
        if f"{scheduler_at}.class" in made and saved.scheduler is not None:
            with making(scheduler_at, source.path):
                handler.set_scheduler(
                    made[f"{scheduler_at}.class"],
                    optimizer=name,
                    interval=saved.scheduler.interval,
                    monitor=saved.scheduler.monitor,
                    **made[f"{scheduler_at}.options"],
                )
    if config.own_step:
        handler.await_part("own_step", "the training step of the program that saved", None)
    _check_used(names, options)
    for part in ("auto_saver", "compile"):
        proposed = options.given.get(part, getattr(config, part))
        if proposed is not None:
            with making(part, source.path):
                handler.propose(part, proposed)
    for at, tree in parts.items():
        if at.startswith("callbacks."):
            _add_callback(handler, names.make(tree, at), at, source.path)


def _set_trained(handler: Components, config: Config, path: str) -> None:
    """Freeze modules and parameters as in the checkpoint. Collective."""
    with making("frozen", path):
        for name in config.frozen:
            handler.freeze_module(name)
        if config.untrained is not None:
            parameters = dict(handler.module.named_parameters())
            for name in config.untrained:
                if name not in parameters:
                    raise StateError("The model has no such parameter", actual=name)
            for name, parameter in parameters.items():
                if parameter.requires_grad is (name in config.untrained):
                    parameter.requires_grad_(name not in config.untrained)
            handler.frozen[:] = config.frozen
        for name in config.kept_eval:
            handler.keep_eval_on_module(name)
    handler.wrap_again()


def _check_loss(handler: Components, groups: Any, path: str) -> None:
    names = [name for group in groups or () for name in group.get("params", ())]
    if handler.loss_module is None and any(str(n).startswith("loss_fn.") for n in names):
        raise CheckpointError(
            "The optimizer of the checkpoint holds parameters of a loss that does not resolve",
            path=path,
            tensor="loss_fn",
            remedy="give it to load: loss_fn=..., or load with skip_optimizer=True",
        )


def _unused(
    names: NameResolver, options: HandlerLoadOptions, *, later: Collection[str] = ()
) -> list[str]:
    """Return the places of the caller's objects that the checkpoint does not have.

    `later`: the parts of the checkpoint that are not resolved yet.
    """
    known = {"auto_saver", "compile", *later}
    parts = {at: at.partition(".")[0] for at in options.given.keys() - names.used}
    return [
        at
        for at, part in sorted(parts.items())
        if part not in known and options.takes("optimizer" if part == "optimizers" else part)
    ]


def _check_used(names: NameResolver, options: HandlerLoadOptions) -> None:
    """Raise StateError for objects of the caller that were not used."""
    unused = _unused(names, options)
    if unused:
        raise StateError(
            "objects= has keys that the checkpoint does not have",
            path=names.path,
            expected="positions in it, as model.class, model.kwargs.width, optimizer.class, "
            "optimizer.options.lr, scheduler.class, callbacks.0, callbacks.0.args.0",
            actual=", ".join(unused),
            remedy="correct or remove these",
        )


def _set_functions(
    handler: Components,
    names: NameResolver,
    source: HandlerSource,
    config: Config,
    options: HandlerLoadOptions,
) -> None:
    """Set the loss and the metrics. Those that do not resolve must be given before training."""
    wanted: dict[str, Any] = {"loss_fn": config.loss_fn}
    wanted |= {f"metrics.{name}": metric for name, metric in config.metrics.items()}
    inner = tuple(f"metrics.{name}." for name in config.metrics)
    added = [at for at in options.given if at.startswith("metrics.") and not at.startswith(inner)]
    wanted |= {at: None for at in added if at not in wanted}
    for at, described in wanted.items():
        if described is None and at not in options.given:
            continue
        names.missing.clear()
        tree = names.resolve(described, at, Slot.FUNCTION)
        made: Any = None if names.missing else names.make(tree, at)
        if not callable(made) and at not in options.given:
            handler.await_part(at, described, _loss_tensors(source) if at == "loss_fn" else None)
        elif at == "loss_fn":
            handler.set_loss_fn(made)
        else:
            name = at.partition(".")[2]
            with making(at, source.path):
                handler.add_metric(name, made, whole_epoch=name in config.whole_epoch)
    at = "loss_arguments"
    names.missing.clear()
    arguments = names.make(names.resolve(config.loss_arguments, at), at)
    handler.loss_arguments = on_device(arguments, handler.device)
    handler.passes_epoch = config.pass_epoch_to_loss
    names.raise_missing(_unused(names, options))


def _loss_tensors(source: HandlerSource) -> nn.Module | None:
    """Return a module with the tensors of a loss that must still be given."""
    if not any(name.startswith("loss_fn.") for name in source.shapes):
        return None
    holder = nn.Module()
    with making("loss_fn", source.path):
        found = api.load_state(source.path, keys="loss_fn", storage=source.storage)
        for name, tensor in found["loss_fn"].items():
            *outer, last = name.split(".")
            module = holder
            for part in outer:
                if part not in child_names(module):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(last, tensor)
    return holder


def _add_callback(handler: Components, made: Any, at: str, path: str) -> None:
    given = not isinstance(made, tuple)
    with making(at, path):
        callback = made if given else made[0](*made[1], **made[2])
        if not given:
            callback.confirmed = False
        handler.add_callback(callback)


def _check_names(handler: Components, source: HandlerSource) -> None:
    """Raise LoadMismatchError for another model, before an optimizer is created for it."""
    own = set(canonical_names(handler.model).values())
    saved = {n.removeprefix("model.") for n in source.shapes if n.startswith("model.")}
    error = Mismatches(
        missing=sorted(f"model.{name}" for name in own - saved),
        unexpected=sorted(f"model.{name}" for name in saved - own),
    ).error(source.path)
    if error is not None:
        error.remedy = _CREATED
        raise error


def restore(
    handler: Components,
    source: HandlerSource,
    saved: Saved | None = None,
    *,
    strict: bool = True,
    skip: Collection[str] = (),
    placed: bool = False,
) -> None:
    """Load a checkpoint into a handler whose parts are set. Collective."""
    path, created = source.path, saved is not None
    if saved is None:  # the handler was not created from the checkpoint
        saved = source.values()
        check_components(handler.config(), saved.config, path)
        _follow(handler, saved.config, path)
    warn_of_loss(handler.config()["loss_fn"], saved.config.loss_fn, handler.rank)
    state = {} if placed else handler.tensor_state()
    if placed or "optimizer" in skip or not optimizers_of(saved.config):
        state.pop("optimizer", None)
        state.pop("optimizers", None)
    ema = None
    if saved.ema is not None and "ema" not in skip:
        with making("ema", path):
            weights = _on_disk(source, "ema.weights") if placed else None
            ema = EMA(handler.model, saved.ema.decay, weights)
        state |= {} if placed else {"ema": {"weights": ema.weights}}
    if source.ranks is None:
        state["ranks"] = PerRank({}, on_resize=lambda every: {"every": every})
    with with_remedy(_CREATED if created else _RESTORED):
        report = api.load(state, path, strict=strict, storage=source.storage)
    if not (strict or placed):  # `place` warns by itself
        warn_of_skipped(path, handler.rank, **skipped_entries(report))

    def apply() -> bytes:
        _apply(handler, source, saved, ema, state.get("ranks"), skip=skip, placed=placed)
        return b""

    with operation("NNHandler: restore") as coordinator:
        exchange(coordinator, "restore", apply, lambda payloads: b"")


def _apply(
    handler: Components,
    source: HandlerSource,
    saved: Saved,
    ema: EMA | None,
    ranks: PerRank | None,
    *,
    skip: Collection[str],
    placed: bool,
) -> None:
    """Restore the values of a checkpoint, when its tensors are loaded. Not collective."""
    path = source.path
    handler.ema = ema or (EMA(handler.model, handler.ema.decay) if handler.ema else None)
    states = {**({MAIN: saved.scheduler} if saved.scheduler else {}), **saved.schedulers}
    for name, scheduler in handler.schedulers.items():
        if name in states and "scheduler" not in skip:
            with making(place_of(name, "scheduler"), path):
                scheduler.load_state_dict(states[name])
    if saved.scaler and not placed:
        _scaler(handler, saved.scaler, path)
    _progress(handler, saved.progress, history="history" not in skip)
    handler.apply_hyperparameters(saved.progress.hyperparameters)
    if "callbacks" not in skip:
        _callbacks(handler.callbacks, saved.callbacks, path)
    if source.ranks is None:
        _restore_rank_values(handler, ranks.value if ranks is not None else {}, path)
    else:
        same = len(source.ranks) == handler.world_size
        own = source.ranks[handler.rank] if same else {"every": source.ranks}
        _restore_rank_values(handler, own, path)


def _on_disk(source: HandlerSource, name: str) -> Any:
    """Return a part of a checkpoint, with tensors that stay on the disk until they are used."""
    found = api.load_state(source.path, keys=name, device_map="disk", storage=source.storage)
    for key in name.split("."):
        found = found[key]
    return found


def restore_tensors(handler: Components, source: HandlerSource) -> None:
    """Load the weights, averages and optimizers of a checkpoint, and nothing else. Collective.

    The options of optimizers, such as the rate, stay as they are: schedulers go on with them.
    """
    state = handler.tensor_state()
    if handler.ema is not None:
        state["ema"] = {"weights": handler.ema.weights}
    groups = [group for one in handler.optimizers.values() for group in one.param_groups]
    options = [{n: copy.deepcopy(v) for n, v in group.items() if n != "params"} for group in groups]
    api.load(state, source.path, storage=source.storage)
    groups = [group for one in handler.optimizers.values() for group in one.param_groups]
    for group, own in zip(groups, options, strict=True):
        group.update(own)


def _follow(handler: Components, saved: Config, path: str) -> None:
    """Apply what was frozen, and the groups of the optimizers, as callbacks had changed them.

    Warns of options that the script has changed since.
    """
    if saved.untrained is None:
        return
    own = handler.config()
    if (own["untrained"], own["frozen"]) != (saved.untrained, saved.frozen):
        for name, parameter in handler.module.named_parameters():
            parameter.requires_grad_(name not in saved.untrained)
        handler.frozen[:] = [n for n in saved.frozen if n in dict(handler.module.named_modules())]
        handler.wrap_again()
    for name, theirs in optimizers_of(saved).items():
        groups = theirs.optimizer.groups or []
        described = own["optimizer"] if name == MAIN else own["optimizers"][name]["optimizer"]
        held = [group["params"] for group in described["groups"]]
        if held != [group.get("params") for group in groups]:
            recipe = handler.optimizations[name].recipe
            with making(f"{place_of(name, 'optimizer')}.groups", path), catch_warnings():
                simplefilter("ignore")  # the scheduler starts again: its state comes next
                handler.make_optimizer(
                    recipe["class"],
                    [{"params": group.get("params")} for group in groups],
                    recipe["options"],
                    name=name,
                    exact=True,
                )
    warn_of_options(own_parts(own), saved, handler)


def _scaler(handler: Components, saved: dict[str, Any], path: str) -> None:
    checked(saved, Scaler, "scaler", path=path)
    if handler.scaler is None:
        handler.set_grad_scaler()
    assert handler.scaler is not None
    handler.scaler.load_state_dict(saved)


def _progress(handler: Components, saved: SavedProgress, *, history: bool) -> None:
    handler.epoch, handler.step = saved.epoch, saved.step
    handler.position = Position(**msgspec.to_builtins(saved.position))
    handler.runs, handler.run_id = list(saved.runs), saved.run_id
    handler.run_steps, handler.validations = list(saved.run_steps), list(saved.validations)
    handler.rates = dict(saved.rates) or {"lr": saved.rate}
    handler.seed_value = saved.seed
    handler.stop_training = saved.stopped
    handler.history = saved.history if history else {}
    handler.history_epochs = {  # checkpoints of 0.1 have none
        name: saved.history_epochs.get(name, list(range(1, len(values) + 1)))
        for name, values in handler.history.items()
    }


def _callbacks(callbacks: list[Callback], saved: dict[str, CallbackState], path: str) -> None:
    names = [state.class_name for state in saved.values()]
    if [type(callback).__name__ for callback in callbacks] != names:
        raise LoadMismatchError(
            "The handler has other callbacks than the checkpoint",
            path=path,
            tensor="callbacks",
            expected=[type(callback).__name__ for callback in callbacks],
            actual=names,
            remedy="add the same callbacks in the same order, or use "
            "NNHandler.load(path, skip_callbacks=True)",
        )
    for callback, (number, state) in zip(callbacks, saved.items(), strict=True):
        with making(f"callbacks.{number}.state", path):
            callback.load_state_dict(state.state)


def _restore_rank_values(handler: Components, own: Any, path: str) -> None:
    """Restore the values of this rank.

    On another number of ranks, rank 0 gets all sums, and random numbers start again.
    """
    every = own.get("every") if isinstance(own, dict) else None
    if every is not None:
        states = [_own_state(state, path) for state in checked(every, list, "ranks", path=path)]
        if not states:
            raise CheckpointError("The checkpoint holds no rank's state", path=path, tensor="ranks")
        with making("progress.seed", path):
            seed_generators(handler.seed_value + 1_000_003 * handler.step + handler.rank)
        handler.position.random = states[handler.rank % len(states)].epoch_random
        sums = _added([state.sums for state in states], times=int(handler.rank == 0))
    else:
        state = _own_state(own, path)
        handler.position.random, sums = state.epoch_random, state.sums
        set_random_state(state.random)
    handler.boundary = None
    if sums is not None:
        handler.boundary = {"random": random_state(), "sums": msgspec.structs.asdict(sums)}


def _own_state(own: Any, path: str) -> OwnState:
    state = checked(own, OwnState, "ranks", path=path)
    check_random(state.random, "ranks.random", path=path)
    if state.epoch_random is not None:
        check_random(state.epoch_random, "ranks.epoch_random", path=path)
    return state


def _added(every: list[Sums | None], *, times: int) -> Sums | None:
    """Return the sums of all ranks for rank 0 (`times` is 1), and zeros for the other ranks."""
    sums = [part for part in every if part is not None]
    if len(sums) < len(every):
        return None
    names = dict.fromkeys(name for part in sums for name in part.sums)

    def count(part: Sums, name: str) -> int:
        return part.counts.get(name, part.count if name in part.sums else 0)

    return Sums(
        sums={name: times * sum(part.sums.get(name, 0.0) for part in sums) for name in names},
        counts={name: times * sum(count(part, name) for part in sums) for name in names},
        metrics=_joined_metrics(sums) if times else {},
    )


def _joined_metrics(sums: list[Sums]) -> dict[str, dict[str, Any]]:
    """Return the batches that metrics of whole epochs have seen; other metrics start again."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for part in sums for name in part.metrics):
        states = [state for part in sums if (state := part.metrics.get(name))]
        if not states:
            continue
        if all(state.keys() == {"outputs", "targets"} for state in states):
            found[name] = {
                key: concatenated_batches([state[key] for state in states]) for key in states[0]
            }
        else:
            warn(
                f"The metric {name!r} starts again within the epoch: its state is that of another "
                "number of ranks"
            )
    return found
