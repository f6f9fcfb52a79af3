"""Move a batch to the device, and call the model and the loss with it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
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
    "concatenated_batches",
    "forward",
    "is_column",
    "kept_outputs",
    "like",
    "map_tensors",
    "on_device",
    "split",
    "to_device",
]

_CACHES = {"past_key_values", "cache"}
"""Outputs of models of transformers that are large and that nobody uses after the batch."""


@dataclass(slots=True)
class Result:
    """The result of a batch: the loss and its terms, and the inputs of metrics."""

    loss: torch.Tensor
    outputs: Any = None
    targets: Any = None
    terms: dict[str, Any] = field(default_factory=dict)
    size: int = 1


def forward(handler: TrainingState, batch: Any, autocast: Any = None) -> Result | None:
    """Return the loss, outputs and targets of a batch.

    Returns None if a training step of the user's own has updated the weights by itself.
    """
    batch = to_device(batch, handler.device, arrays=handler.training_step is None)
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
    """Return the inputs and the targets of a batch.

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
    several = isinstance(inputs, (tuple, list))
    if several and not binds(module, (inputs,)) and binds(module, inputs):
        return model(*inputs)
    return model(inputs)


_signatures: WeakKeyDictionary[nn.Module, tuple[Any, inspect.Signature]] = WeakKeyDictionary()


def _signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of a module's forward. Cached, as it takes longer than a small layer."""
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


def map_tensors(act: Callable[[Any], Any], value: Any) -> Any:
    """Apply `act` to the tensors and arrays of a nested value, and to objects that have a `to`.

    Containers keep their types. PackedSequence and BatchEncoding have a method `to`.
    """
    if isinstance(value, (torch.Tensor, np.ndarray)) or callable(getattr(value, "to", None)):
        return act(value)
    if isinstance(value, Mapping):
        return like(value, {key: map_tensors(act, item) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map_tensors(act, item) for item in value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(act, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        changed = {name: map_tensors(act, item) for name, item in fields.items()}
        return dataclasses.replace(value, **changed)
    return value


def like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return a mapping of the same type with other items."""
    if type(value) is dict or not isinstance(value, dict):
        return items
    made = copy.copy(value)
    for key, item in items.items():  # the outputs of transformers have no method `update`
        made[key] = item
    return made


def _as_tensor(part: Any) -> Any:
    """Return an array of numbers as a tensor, and any other value unchanged."""
    numbers = isinstance(part, np.ndarray) and part.dtype.kind in "biufc"
    return torch.from_numpy(np.array(part)) if numbers else part


def to_device(value: Any, device: torch.device, *, arrays: bool = True) -> Any:
    """Move the tensors of a nested value to a device; see map_tensors.

    `arrays`: arrays of numbers become tensors.
    """

    def move(part: Any) -> Any:
        part = _as_tensor(part) if arrays else part
        return part if isinstance(part, np.ndarray) else part.to(device)

    return value.to(device) if isinstance(value, torch.Tensor) else map_tensors(move, value)


def on_device(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return keyword arguments with their tensors and modules on a device. Others are unchanged."""
    if device.type == "meta":
        return dict(arguments)
    moved = (torch.Tensor, nn.Module)
    return {
        n: item.to(device) if isinstance(item, moved) else item for n, item in arguments.items()
    }


def kept_outputs(outputs: Any) -> Any:
    """Return the outputs of a batch on the CPU, without their graph and transformers' caches."""
    caches = _CACHES & outputs.keys() if isinstance(outputs, Mapping) else set()
    if caches and dataclasses.is_dataclass(outputs):  # as in transformers
        outputs = dataclasses.replace(outputs, **dict.fromkeys(caches))  # type: ignore[type-var]
    elif caches:
        outputs = {key: item for key, item in outputs.items() if key not in caches}
    return map_tensors(_kept, outputs)


def _kept(part: Any) -> Any:
    part = _as_tensor(part)
    if isinstance(part, np.ndarray):
        return part
    if isinstance(part, torch.Tensor):
        return part.detach().to("cpu")
    if isinstance(part, nn.utils.rnn.PackedSequence):
        part = part._replace(data=part.data.detach())
    return part.to(torch.device("cpu"))


def batch_size(targets: Any) -> int:
    """Return the number of samples in a tensor, in collated containers of tensors, or in a list."""
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


def is_column(value: Any) -> bool:
    """Whether a value is a list with a text or a number for each sample."""
    return isinstance(value, list) and any(isinstance(item, (str, int, float)) for item in value)


def concatenated_batches(parts: list[Any]) -> Any:
    """Concatenate the outputs of several batches along their first dimension.

    The containers are those of the last part: the first one may come from a checkpoint.
    """
    last = parts[-1]
    if isinstance(last, torch.Tensor):
        try:
            return torch.cat([part if part.dim() else part.reshape(1) for part in parts])
        except (RuntimeError, TypeError) as error:
            raise StateError(
                "The outputs of the batches can't be concatenated",
                expected="tensors of one shape, except for the first dimension",
                actual=", ".join(dict.fromkeys(str(tuple(part.shape)) for part in parts))[:200],
                remedy="pad them to one shape, or take one batch at a time",
            ) from error
    if isinstance(last, Mapping):
        return like(
            last, {key: concatenated_batches([part[key] for part in parts]) for key in last}
        )
    if is_column(last):
        return [item for part in parts for item in part]
    if isinstance(last, (list, tuple)):
        items = [concatenated_batches(list(items)) for items in zip(*parts, strict=True)]
        return last._make(items) if hasattr(last, "_make") else type(last)(items)
    if last is None:
        return None
    raise StateError(
        "The outputs of the model can't be concatenated",
        expected="tensors, lists of texts or numbers, or tuples, lists and dicts of these",
        actual=type(last).__name__,
        remedy="call predict with one batch at a time",
    )
