"""Rebuilding a handler from a sharded checkpoint or a torch file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import shardckpt
from shardckpt.errors import CheckpointNotFoundError, CorruptionError, NotACheckpointError
from shardckpt.execution.memory import MemoryStorage
from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.objects import build, find
from shardckpt.nn_handler.parallel import Parallel
from shardckpt.nn_handler.placing import place
from shardckpt.nn_handler.saving import is_torch_file
from shardckpt.planning.device_map import DeviceMap
from shardckpt.planning.load_plan import Mismatches
from shardckpt.planning.stateful import canonical_names
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage

if TYPE_CHECKING:
    from shardckpt.nn_handler.handler import NNHandler

__all__ = ["load", "read_torch_file"]


def read_torch_file(path: str) -> Any:
    """The content of a torch file on the CPU, by weights_only; typed errors for all else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            "There is nothing at this path", path=path, remedy="check the path"
        ) from error
    except Exception as error:
        raise CorruptionError(
            "torch.load(weights_only=True) refuses this file",
            path=path,
            actual=str(error).splitlines()[0],
            remedy="load another checkpoint; files with pickled objects are never loaded",
        ) from error


def load(
    handler_class: type[NNHandler],
    path: str,
    *,
    device: str | torch.device,
    parallel: Parallel,
    strict: bool,
    model_class: Callable[..., nn.Module] | None,
    loss_fn: Callable[..., Any] | None,
    metrics: Mapping[str, Callable[..., Any]] | None,
    skip_optimizer: bool,
    device_map: DeviceMap,
) -> NNHandler:
    """Rebuild a handler; collective, but with a device map. See NNHandler.load."""
    storage: Storage = LocalStorage()
    if is_torch_file(path):
        storage = MemoryStorage(read_torch_file(path))
    config = shardckpt.load_state(path, keys="config", storage=storage).get("config")
    if not isinstance(config, dict) or "model" not in config:
        raise NotACheckpointError(
            "This checkpoint was not saved by an NNHandler",
            path=path,
            expected="the entry config.model",
            remedy="load it with shardckpt.load, into your own model",
        )
    chosen = model_class or find(config["model"]["name"], at="model_class")
    kwargs = config["model"]["kwargs"]
    if device_map is None:
        handler = handler_class(chosen, device, parallel=parallel, seed=config["seed"], **kwargs)
    else:
        with torch.device("meta"):
            handler = handler_class(chosen, "meta", parallel="none", seed=config["seed"], **kwargs)
        handler.device = place(
            handler.model,
            lambda: chosen(**kwargs),
            path,
            storage,
            device_map=device_map,
            strict=strict,
        )
    if strict:
        _check_names(handler, path, storage)
    if config["optimizer"] and not skip_optimizer and device_map is None:
        _set_optimizer(handler, config)
    if config["loss_fn"] or loss_fn:
        handler.set_loss_fn(loss_fn or build(config["loss_fn"], at="loss_fn"))
    for name, metric in config["metrics"].items():
        handler.add_metric(name, (metrics or {}).get(name) or build(metric, at="metrics"))
    if config["auto_saver"]:
        handler.auto_saver = AutoSaver.from_state(config["auto_saver"])
    _fill(handler, path, storage, strict=strict, placed=device_map is not None)
    return handler


def _check_names(handler: NNHandler, path: str, storage: Storage) -> None:
    """A checkpoint of another model is told before an optimizer is made for the wrong one."""
    own = set(canonical_names(handler.model).values())
    with shardckpt.open_checkpoint(path, storage=storage) as checkpoint:
        saved = {
            name.removeprefix("model.")
            for name in checkpoint.tensors()
            if name.startswith("model.")
        }
    error = Mismatches(
        missing=sorted(f"model.{name}" for name in own - saved),
        unexpected=sorted(f"model.{name}" for name in saved - own),
    ).error(path)
    if error is not None:
        raise error


def _set_optimizer(handler: NNHandler, config: dict[str, Any]) -> None:
    described = config["optimizer"]
    kind = find(described["name"], at="optimizer", kind=torch.optim.Optimizer)
    handler.set_optimizer(kind, groups=described["groups"], **described["options"])
    if config["scheduler"]:
        scheduler = find(config["scheduler"]["name"], at="scheduler")
        handler.set_scheduler(scheduler, **config["scheduler"]["options"])


def _fill(handler: NNHandler, path: str, storage: Storage, *, strict: bool, placed: bool) -> None:
    from shardckpt.nn_handler.handler import set_random_state

    state = handler.state()
    del state["config"]
    if placed:
        del state["model"]
    shardckpt.load(state, path, strict=strict, storage=storage)
    handler.epoch = state["progress"]["epoch"]
    handler.step = state["progress"]["step"]
    handler.history = state["progress"]["history"]
    set_random_state(state["random"].value)
