"""Rebuilding a handler, or filling one, from anything that the package can read."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import shardckpt
from shardckpt.convert.whole_files import INDEX, is_one_file, read_many, read_one
from shardckpt.errors import LoadMismatchError, NotACheckpointError
from shardckpt.loading.memory_checkpoint import MemoryStorage
from shardckpt.nn_handler.callbacks import Callback
from shardckpt.nn_handler.data import Position
from shardckpt.nn_handler.ema import EMA
from shardckpt.nn_handler.model_code import class_of_code
from shardckpt.nn_handler.objects import build
from shardckpt.nn_handler.parallel import Parallel
from shardckpt.nn_handler.placement import place
from shardckpt.nn_handler.random_state import seed_generators, set_random_state
from shardckpt.plan.device_map import DeviceMap
from shardckpt.state.matching import Mismatches
from shardckpt.state.module_state import canonical_names
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = ["LoadOptions", "Source", "load", "open_source", "restore"]

_VALUES = ("config", "progress", "callbacks", "scheduler", "scaler", "ema.decay")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint, of whatever kind, as a Storage sees it; `ranks`, of a whole file, what each
    rank had of its own."""

    path: str
    storage: Storage
    ranks: list[Any] | None = None

    def values(self) -> dict[str, Any]:
        """All of a handler's checkpoint that is small, read on this rank; not collective."""
        found = shardckpt.load_state(self.path, keys=_VALUES, storage=self.storage)
        config = found.get("config") if isinstance(found, dict) else None
        if not isinstance(config, dict) or "model" not in config:
            raise NotACheckpointError(
                "This checkpoint was not saved by an NNHandler",
                path=self.path,
                expected="the entry config.model",
                remedy="load its weights with NNHandler.initialize_from_checkpoint",
            )
        return found  # type: ignore[no-any-return]


def open_source(path: str) -> Source:
    """Open a sharded checkpoint, a torch or safetensors file, or a directory of several."""
    if is_one_file(path):
        state = read_one(path)
    elif os.path.isfile(os.path.join(path, INDEX)):
        state = read_many(path)
    else:
        return Source(path=path, storage=LocalStorage())
    if not isinstance(state, Mapping):
        raise NotACheckpointError("This file holds no dict", path=path, actual=type(state).__name__)
    state = dict(state)
    ranks = state.pop("ranks", None) if "config" in state else None
    return Source(path=path, storage=MemoryStorage(state), ranks=ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The arguments of NNHandler.load."""

    device: str | torch.device | None
    device_map: DeviceMap
    strict: bool
    skip: Collection[str]
    parallel: Parallel
    device_mesh: Any
    tp_plan: Mapping[str, Any] | None
    objects: Mapping[str, Any]
    trust_code: bool


def load(handler_class: type[NNHandler], path: str, options: LoadOptions) -> NNHandler:
    """Rebuild a handler; collective, but with a device map. See NNHandler.load."""
    source = open_source(path)
    saved = source.values()
    config, given = saved["config"], options.objects
    chosen = _model_class(config, path, given, trust_code=options.trust_code)
    kwargs = build(config["model"]["kwargs"], at="model.kwargs", given=given)
    code = config["code"]
    if options.device_map is None:
        handler = handler_class(
            chosen,
            options.device,
            parallel=options.parallel,
            device_mesh=options.device_mesh,
            tp_plan=options.tp_plan,
            **kwargs,
        )
    else:
        with torch.device("meta"):
            handler = handler_class(chosen, "meta", parallel="none", **kwargs)
        inputs = place(
            handler.model,
            lambda: chosen(**kwargs),
            path,
            source.storage,
            device_map=options.device_map,
            strict=options.strict,
        )
        handler.use_device(inputs)
    handler.adopt_code(code, config["model"]["class"] if options.trust_code else None)
    if options.strict:
        _check_names(handler, source)
    _set_parts(handler, config, options)
    for number, described in enumerate(config["callbacks"]):
        if "callbacks" not in options.skip:
            _add_callback(handler, described, number, given)
    restore(
        handler,
        source,
        saved,
        strict=options.strict,
        skip=options.skip,
        placed=options.device_map is not None,
    )
    return handler


def _model_class(
    config: dict[str, Any], path: str, given: Mapping[str, Any], *, trust_code: bool
) -> Callable[..., nn.Module]:
    described = config["model"]["class"]
    if trust_code and "model.class" not in given:
        name = described.get("shardckpt.import", "")
        return class_of_code(config["code"] or {}, name, path=path)  # type: ignore[no-any-return]
    return build(described, at="model.class", given=given)  # type: ignore[no-any-return]


def _set_parts(handler: NNHandler, config: dict[str, Any], options: LoadOptions) -> None:
    given, placed = options.objects, options.device_map is not None
    for name in config["frozen"]:
        handler.freeze_module(name)
    optimizer, scheduler = config["optimizer"], config["scheduler"]
    if optimizer and "optimizer" not in options.skip and not placed:
        made = build(optimizer, at="optimizer", given=given)
        handler.set_optimizer(made["class"], groups=made["groups"], **made["options"])
        if scheduler and "scheduler" not in options.skip:
            made = build(scheduler, at="scheduler", given=given)
            handler.set_scheduler(
                made["class"],
                interval=made["interval"],
                monitor=made["monitor"],
                **made["options"],
            )
    if config["loss_fn"] is not None or "loss_fn" in given:
        handler.set_loss_fn(build(config["loss_fn"], at="loss_fn", given=given))
    metrics = {**config["metrics"], **{n[8:]: None for n in given if n.startswith("metrics.")}}
    for name, metric in metrics.items():
        handler.add_metric(name, build(metric, at=f"metrics.{name}", given=given))
    if config["auto_saver"]:
        handler.auto_save(**{**config["auto_saver"], "resume": None})
    if config["compile"] is not None and not placed:
        handler.compile_model(**build(config["compile"], at="compile", given=given))


def _add_callback(
    handler: NNHandler, described: dict[str, Any], number: int, given: Mapping[str, Any]
) -> None:
    made = build(described, at=f"callbacks.{number}", given=given)
    if isinstance(made, dict):
        made = made["class"](*made["args"], **made["kwargs"])
    handler.add_callback(made)


def _check_names(handler: NNHandler, source: Source) -> None:
    """A checkpoint of another model is told before an optimizer is made for the wrong one."""
    own = set(canonical_names(handler.model).values())
    with shardckpt.open_checkpoint(source.path, storage=source.storage) as checkpoint:
        tensors = checkpoint.tensors()
    saved = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    error = Mismatches(
        missing=sorted(f"model.{name}" for name in own - saved),
        unexpected=sorted(f"model.{name}" for name in saved - own),
    ).error(source.path)
    if error is not None:
        raise error


def restore(
    handler: NNHandler,
    source: Source,
    saved: dict[str, Any] | None = None,
    *,
    strict: bool = True,
    skip: Collection[str] = (),
    placed: bool = False,
) -> None:
    """Fill a handler, whose parts are set, with what a checkpoint holds; collective."""
    if saved is None:  # the handler was not made of the checkpoint
        saved = source.values()
        _check_parts(handler.config(), saved["config"], source.path)
    state = {} if placed else handler.tensor_state()
    if placed or "optimizer" in skip or not saved["config"]["optimizer"]:
        state.pop("optimizer", None)
    ema = _ema(handler, saved, skip=placed or "ema" in skip)
    if ema is not None:
        state["ema"] = {"weights": ema.weights}
    if source.ranks is None:
        state["ranks"] = shardckpt.PerRank({}, on_resize=lambda every: {"every": every})
    shardckpt.load(state, source.path, strict=strict, storage=source.storage)
    handler.ema = ema or (EMA(handler.model, handler.ema.decay) if handler.ema else None)
    if handler.scheduler is not None and "scheduler" in saved and "scheduler" not in skip:
        handler.scheduler.load_state_dict(saved["scheduler"])
    if saved.get("scaler") and not placed:
        if handler.scaler is None:
            handler.set_grad_scaler()
        assert handler.scaler is not None
        handler.scaler.load_state_dict(saved["scaler"])
    _progress(handler, saved["progress"], history="history" not in skip)
    if "callbacks" not in skip:
        _callbacks(handler.callbacks, saved["callbacks"], source.path)
    own: dict[str, Any]
    if source.ranks is None:
        own = state["ranks"].value
    else:
        same = len(source.ranks) == handler.world_size
        own = source.ranks[handler.rank] if same else {"every": source.ranks}
    _own(handler, own)


def _check_parts(own: dict[str, Any], saved: dict[str, Any], path: str) -> None:
    """An optimizer or a scheduler that is missing, or is of another class, is no detail."""
    for part in ("optimizer", "scheduler"):
        kinds = [config[part]["class"] if config[part] else None for config in (own, saved)]
        if kinds[0] == kinds[1] or all(kind and "shardckpt.absent" in kind for kind in kinds):
            continue
        raise LoadMismatchError(
            f"The handler has another {part} than the checkpoint",
            path=path,
            expected=next(iter((kinds[0] or {"": "none"}).values())),
            actual=next(iter((kinds[1] or {"": "none"}).values())),
            remedy=f"set_{part} as it was when this was saved; to change it, NNHandler.load with "
            f"skip_{part}=True, and then set_{part}",
        )


def _ema(handler: NNHandler, saved: dict[str, Any], *, skip: bool) -> EMA | None:
    if skip or "ema" not in saved:
        return None
    return EMA(handler.model, saved["ema"]["decay"])


def _progress(handler: NNHandler, saved: dict[str, Any], *, history: bool) -> None:
    handler.epoch, handler.step = saved["epoch"], saved["step"]
    handler.position = Position(**saved["position"])
    handler.runs, handler.run_id = list(saved["runs"]), saved["run_id"]
    handler.rate, handler.seed_value = saved["rate"], saved["seed"]
    handler.stop_training = saved["stopped"]
    handler.history = saved["history"] if history else {}


def _callbacks(callbacks: list[Callback], saved: dict[str, Any], path: str) -> None:
    kinds = {
        name: found
        for number, (name, state) in enumerate(saved.items())
        if number >= len(callbacks) or type(callbacks[number]).__name__ != (found := state["kind"])
    }
    if kinds or len(callbacks) != len(saved):
        raise LoadMismatchError(
            "The handler has other callbacks than the checkpoint",
            path=path,
            expected=[type(callback).__name__ for callback in callbacks],
            actual=[state["kind"] for state in saved.values()],
            remedy="add the same callbacks in the same order, or load with skip_callbacks=True",
        )
    for callback, state in zip(callbacks, saved.values(), strict=True):
        callback.load_state_dict(state["state"])


def _own(handler: NNHandler, own: dict[str, Any]) -> None:
    """What each rank has of its own; on another number of ranks, sums go to rank 0 and random
    numbers begin anew."""
    every = own.get("every")
    if every is not None:
        seed_generators(handler.seed_value + 1_000_003 * handler.step + handler.rank)
        handler.position.random = every[handler.rank % len(every)]["epoch_random"]
        own = {"random": None, "sums": _added([found["sums"] for found in every])}
        if handler.rank and own["sums"]:
            own["sums"] = _added([own["sums"]], times=0)
    else:
        handler.position.random = own["epoch_random"]
        set_random_state(own["random"])
    handler.boundary = None
    if own["sums"] is not None:
        handler.boundary = {"random": handler.random_now(), "sums": own["sums"]}


def _added(sums: list[Any], *, times: int = 1) -> dict[str, Any] | None:
    if any(part is None for part in sums):
        return None
    names = sums[0]["sums"]
    return {
        "count": times * sum(part["count"] for part in sums),
        "sums": {name: times * sum(part["sums"][name] for part in sums) for name in names},
    }
