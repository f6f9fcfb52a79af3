"""A model for inference on the devices of a device map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from shardckpt import api
from shardckpt.errors import LoadMismatchError, StateError
from shardckpt.nn_handler.initializing import warn_of_skipped
from shardckpt.plan.device_map import DeviceMap
from shardckpt.storage.base import Storage

__all__ = ["below_model", "place"]


def below_model(device_map: DeviceMap) -> DeviceMap:
    """Turn a device map of names in the model into one of names in a handler's checkpoint."""
    if not isinstance(device_map, Mapping):
        return device_map
    return {f"model.{prefix}".rstrip("."): device for prefix, device in device_map.items()}


def place(
    model: nn.Module,
    make: Callable[[], nn.Module],
    path: str,
    storage: Storage,
    *,
    device_map: DeviceMap,
    strict: bool,
) -> torch.device:
    """Fill a model on the meta device from a handler's checkpoint, each tensor on its device.

    `make` creates the model again, for buffers that no checkpoint holds. Returns the device of
    inputs.
    """
    _check_prefixes(model, device_map, path)
    saved = api.load_state(
        path,
        keys="model",
        strict=False,  # a model without tensors has no entry
        device_map=below_model(device_map),
        storage=storage,
    )
    try:
        found = model.load_state_dict(saved.get("model", {}), strict=strict, assign=True)
    except RuntimeError as error:  # names or shapes
        raise LoadMismatchError(
            "The model does not fit the checkpoint",
            path=path,
            actual=str(error)[:2000],
            remedy="give the model of the checkpoint: model_class=..., or "
            'objects={"model.kwargs": {...}}',
        ) from error
    warn_of_skipped(path, 0, missing=found.missing_keys, unexpected=found.unexpected_keys)
    first = next(model.parameters(), torch.empty(0, device="cpu")).device
    inputs = torch.device("cpu") if first.type == "meta" else first
    _fill_buffers(model, make, inputs)
    devices = {p.device for p in model.parameters() if not p.is_meta}
    if len(devices) > 1:
        for module in model.modules():
            own = next(module.parameters(recurse=False), None)
            if own is not None:
                module.register_forward_pre_hook(_mover(own.device), with_kwargs=True)
    return inputs


def _check_prefixes(model: nn.Module, device_map: DeviceMap, path: str) -> None:
    """Raise StateError for a prefix that names no part of the model."""
    if not isinstance(device_map, Mapping):
        return
    names = {*dict(model.named_modules(remove_duplicate=False)), *model.state_dict()}
    wrong = [prefix for prefix in device_map if prefix.rstrip(".") not in names]
    if wrong:
        raise StateError(
            "The device map names parts that the model does not have",
            path=path,
            expected=", ".join(sorted(filter(None, names))[:30]),
            actual=", ".join(map(repr, wrong)),
            remedy="correct these prefixes, or leave them out",
        )


def _fill_buffers(model: nn.Module, make: Callable[[], nn.Module], device: torch.device) -> None:
    """Fill the buffers that are not persistent: those of a new model have the same values."""
    saved = set(model.state_dict())
    missing = [
        name for name, buffer in model.named_buffers() if buffer.is_meta and name not in saved
    ]
    if missing:
        made = dict(make().named_buffers())
        for name in missing:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, made[name].to(device))


def _mover(device: torch.device) -> Callable[..., Any]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}

    return hook
