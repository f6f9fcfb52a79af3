"""One batch: to the device, through the model and the loss."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from shardckpt.errors import StateError
from shardckpt.nn_handler.training_state import TrainingState

__all__ = [
    "Result",
    "Several",
    "batch_size",
    "binds",
    "call_model",
    "forward",
    "joined",
    "split",
    "to_device",
]


@dataclass(slots=True)
class Result:
    """The result of a batch: the loss and its terms, and the inputs of metrics."""

    loss: torch.Tensor
    outputs: Any = None
    targets: Any = None
    terms: dict[str, Any] = field(default_factory=dict)
    size: int = 1


def forward(handler: TrainingState, batch: Any, autocast: Any = None) -> Result | None:
    """The loss, outputs and targets of a batch.

    None if a training step of the user's own has updated the weights by itself.
    """
    batch = to_device(batch, handler.device)
    with autocast or nullcontext():
        if handler.training_step is not None:
            return _of_step(handler.training_step(handler, batch), batch)
        inputs, targets = split(batch, handler.module)
        outputs = call_model(handler.model, inputs, handler.module)
        if handler.loss_fn is None:
            found = outputs.get("loss") if isinstance(outputs, Mapping) else None
            found = getattr(outputs, "loss", None) if found is None else found
            if found is None:
                raise StateError(
                    "The handler has no loss, and the outputs of the model have none",
                    expected='outputs with a "loss"',
                    actual=type(outputs).__name__,
                    remedy="call set_loss_fn first",
                )
        else:
            epoch = {"epoch": handler.epoch} if handler.passes_epoch else {}
            found = handler.loss_fn(outputs, targets, **handler.loss_arguments, **epoch)
    size = batch_size(targets)
    return _result(found, outputs, targets, size)


def _of_step(found: Any, batch: Any) -> Result | None:
    if found is None:
        return None
    extra = dict(found) if isinstance(found, Mapping) else {"loss": found}
    outputs, targets = extra.pop("outputs", None), extra.pop("targets", None)
    return _result(extra, outputs, targets, batch_size(batch if targets is None else targets))


def _result(found: Any, outputs: Any, targets: Any, size: int) -> Result:
    terms = dict(found) if isinstance(found, Mapping) else {"loss": found}
    loss = terms.pop("loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
        raise StateError(
            "The loss is not a scalar tensor",
            expected='a tensor with one element, or a dict {"loss": tensor, "<term>": number}',
            actual=f"{type(found if loss is None else loss).__name__}{shape}",
            remedy="return the sum to minimize, and its terms by name beside it: "
            '{"loss": a + b, "a": a, "b": b}',
        )
    return Result(loss.reshape(()) if loss.dim() else loss, outputs, targets, terms, size)


def split(batch: Any, module: nn.Module) -> tuple[Any, Any]:
    """The inputs and the targets of a batch.

    A dict is both: the model gets the items that its forward has parameters for, the loss and the
    metrics get all items.
    """
    if isinstance(batch, Mapping):
        return batch, batch
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, (tuple, list)) and len(batch) > 2 and binds(module, batch[:-1]):
        return Several(batch[:-1]), batch[-1]
    raise StateError(
        "A batch has an unknown form",
        expected="(inputs, targets), (input, ..., targets) or a dict",
        actual=f"{type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""),
        remedy="use a dataset of pairs, or a collate_fn that returns them; or handle batches of "
        "any form in a step of your own: handler.set_training_step(step)",
    )


class Several(tuple[Any, ...]):
    """Inputs that the model takes one by one."""


def call_model(model: nn.Module, inputs: Any, module: nn.Module) -> Any:
    """Call the model.

    A dict whose keys are parameters of forward is passed by name. The items of a tuple are passed
    one by one if forward does not take one argument.
    """
    if isinstance(inputs, Mapping):
        names = _signature(module).parameters
        own = {key: item for key, item in inputs.items() if key in names}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in names.values())
        given = inputs if own and takes_any else own
        if own and binds(module, (), given):
            return model(**given)
    if type(inputs) is Several:
        return model(*inputs)
    plain = type(inputs) in (tuple, list)
    if plain and not binds(module, (inputs,)) and binds(module, inputs):
        return model(*inputs)
    return model(inputs)


_signatures: WeakKeyDictionary[nn.Module, tuple[Any, inspect.Signature]] = WeakKeyDictionary()


def _signature(module: nn.Module) -> inspect.Signature:
    """The signature of a module's forward, kept because it takes longer than a small layer."""
    function = getattr(module.forward, "__func__", None)
    if function is None:  # an attribute of the instance
        return inspect.signature(module.forward)
    if module not in _signatures or _signatures[module][0] is not function:
        _signatures[module] = function, inspect.signature(module.forward)
    return _signatures[module][1]


def binds(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the forward of a module takes these arguments."""
    try:
        _signature(module).bind(*args, **(kwargs or {}))
    except TypeError:
        return False
    return True


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested value to a device.

    Containers keep their types. Objects with a method `to` move themselves, such as PackedSequence
    and BatchEncoding.
    """
    if isinstance(value, torch.Tensor) or callable(getattr(value, "to", None)):
        return value.to(device)
    if isinstance(value, dict):
        moved = {key: to_device(item, device) for key, item in value.items()}
        return moved if type(value) is dict else _like(value, moved)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(to_device(item, device) for item in value)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        moved = {name: to_device(item, device) for name, item in fields.items()}
        return dataclasses.replace(value, **moved)
    return value


def _like(value: dict[Any, Any], moved: dict[Any, Any]) -> dict[Any, Any]:
    made = copy.copy(value)
    made.update(moved)
    return made


def batch_size(targets: Any) -> int:
    """The number of samples in a tensor, in collated containers of tensors, or in a list."""
    if isinstance(targets, nn.utils.rnn.PackedSequence):
        return int(targets.batch_sizes[0])
    if isinstance(targets, torch.Tensor):
        return len(targets) if targets.dim() else 1
    if not isinstance(targets, (Mapping, list, tuple)):
        return 1
    items = list(targets.values()) if isinstance(targets, Mapping) else list(targets)
    sizes = {len(i) for i in items if isinstance(i, torch.Tensor) and i.dim()}
    if isinstance(targets, Mapping) and sizes:
        return next(len(i) for i in items if isinstance(i, torch.Tensor) and i.dim())
    return sizes.pop() if len(sizes) == 1 else max(len(items), 1)


def joined(parts: list[Any]) -> Any:
    """Concatenate the outputs of several batches along their first dimension."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat([part if part.dim() else part.reshape(1) for part in parts])
    if isinstance(first, Mapping):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_make"):
        return first._make(joined(list(items)) for items in zip(*parts, strict=True))
    if isinstance(first, (list, tuple)):
        return type(first)(joined(list(items)) for items in zip(*parts, strict=True))
    if first is None:
        return None
    raise StateError(
        "The outputs of the model can't be concatenated",
        expected="tensors, or tuples, lists and dicts of them",
        actual=type(first).__name__,
        remedy="call predict with one batch at a time",
    )
