"""The rules for names in checkpoints.

A name is data. It is looked up in the modules that the program has imported, and nothing is
imported for it. It resolves only if a rule below allows the object in the slot that it fills.
"""

from __future__ import annotations

import enum
import types
from typing import Any

from torch import nn
from torch.nn import functional
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from shardckpt.errors import StateError
from shardckpt.format.typed_json import imported
from shardckpt.nn_handler.callback import Callback

__all__ = [
    "Slot",
    "import_name",
    "is_function",
    "is_functional",
    "is_torch_module",
    "resolve_name",
    "trust",
]

_CALLBACKS = tuple(
    f"shardckpt.nn_handler.{name}" for name in ("callback", "callbacks", "loggers", "progress")
)
_prefixes: set[str] = set()
_objects: dict[str, Any] = {}


class Slot(enum.Enum):
    """The place that a name fills."""

    MODEL = "model"
    OPTIMIZER = "optimizer"
    SCHEDULER = "scheduler"
    CALLBACK = "callback"
    FUNCTION = "loss or metric"
    ARGUMENT = "argument"


_BASES: dict[Slot, tuple[type, ...]] = {
    Slot.MODEL: (nn.Module,),
    Slot.OPTIMIZER: (Optimizer,),
    Slot.SCHEDULER: (LRScheduler,),
    Slot.CALLBACK: (Callback,),
    Slot.FUNCTION: (nn.Module,),
    Slot.ARGUMENT: (nn.Module, Optimizer, LRScheduler, Callback),
}


def trust(*trusted: str | type | types.FunctionType) -> None:
    """Let names in checkpoints resolve to your classes and functions, in this process.

    Without it, NNHandler.load resolves only what docs/security.md lists: classes of torch.nn, of
    torch.optim and its schedulers, callbacks of shardckpt, and models, optimizers, schedulers and
    callbacks whose modules your program has imported. Losses, metrics and other arguments must be
    trusted. No module is imported, and load calls no function. Not collective.

    Args:
        trusted: Names of modules, classes or functions. "mylab" includes "mylab.metrics".

    Raises:
        StateError: An argument is neither the name of a module nor a class or function.

    Example:
        >>> import shardckpt
        >>> shardckpt.trust("mylab")
    """
    for item in trusted:
        if isinstance(item, str) and all(part.isidentifier() for part in item.split(".")):
            _prefixes.add(item)
        elif isinstance(item, (type, types.FunctionType)):
            _objects[f"{item.__module__}:{item.__qualname__}"] = item
        else:
            raise StateError(
                "Only modules, classes and functions can be trusted",
                expected='the name of a module, as in trust("mylab"), a class or a function',
                actual=repr(item),
            )


def import_name(value: Any) -> str | None:
    """Return `module:qualname` of a class or function. None if that name does not lead to it."""
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if is_functional(value):
        module = functional.__name__  # the module of gelu and others is hidden
    found = _unwrapped(imported(module or "", qualname))
    return f"{module}:{qualname}" if found is value else None


def resolve_name(name: str, slot: Slot, *, instance: bool, with_arguments: bool = False) -> Any:
    """Resolve a name in a slot. Returns None if no rule allows it.

    `instance`: the checkpoint describes an instance of the class, not the class.
    `with_arguments`: it also chooses arguments for later calls of the function.
    """
    module, _, qualname = name.partition(":")
    found = _objects.get(name) or _unwrapped(imported(module, qualname))
    if issubclass(type(found), type):
        fits = {Slot.FUNCTION: instance, Slot.ARGUMENT: True}.get(slot, not instance)
        return found if fits and _is_class_for(found, slot, instance=instance) else None
    fits = slot in (Slot.FUNCTION, Slot.ARGUMENT) and not instance
    allowed = is_function(found) and _is_allowed(found, with_arguments=with_arguments)
    return found if fits and allowed else None


def is_function(value: Any) -> bool:
    """Whether a value is a plain function of Python or C."""
    return type(value) in (types.FunctionType, types.BuiltinFunctionType)


def is_functional(value: Any) -> bool:
    """Whether a value is a public function of torch.nn.functional."""
    name = value.__name__ if is_function(value) else "_"
    if name.startswith(("_", "has_torch_")) or vars(functional).get(name) is not value:
        return False
    return type(value) is not types.FunctionType or _home(value) == functional.__name__


def is_torch_module(cls: Any) -> bool:
    """Whether a class is a module of torch.nn."""
    public = issubclass(cls, nn.Module) and vars(nn).get(cls.__name__) is cls
    return public and _home(cls).startswith("torch.nn.modules.")


def _unwrapped(found: Any) -> Any:
    return found.__func__ if type(found) is staticmethod else found


def _home(value: Any) -> str:
    """Return the value of __module__ of a class or function."""
    get = type.__getattribute__ if issubclass(type(value), type) else object.__getattribute__
    home = get(value, "__module__")
    return home if type(home) is str else ""


def _is_trusted(value: Any) -> bool:
    home = f"{_home(value)}."
    return any(value is item for item in _objects.values()) or any(
        home.startswith(f"{prefix}.") for prefix in _prefixes
    )


def _is_class_for(cls: Any, slot: Slot, *, instance: bool) -> bool:
    if _is_trusted(cls):
        return slot in (Slot.FUNCTION, Slot.ARGUMENT) or issubclass(cls, _BASES[slot])
    if not issubclass(cls, nn.Module if instance else _BASES[slot]):
        return False
    home = _home(cls)
    if home.partition(".")[0] == "torch":  # torch imports far more than a program uses
        lazy = issubclass(cls, nn.modules.lazy.LazyModuleMixin)
        return (is_torch_module(cls) and not lazy) or _is_torch_optimizer(cls)
    return home in _CALLBACKS or home.partition(".")[0] != "shardckpt"


def _is_torch_optimizer(cls: Any) -> bool:
    if issubclass(cls, Optimizer):
        return f"{_home(cls)}.".startswith("torch.optim.")
    return issubclass(cls, LRScheduler) and _home(cls) in (
        lr_scheduler.__name__,
        swa_utils.__name__,
    )


def _is_allowed(function: Any, *, with_arguments: bool) -> bool:
    """Whether a function is one of torch.nn.functional or of the main script, or is trusted.

    With arguments that a checkpoint chooses, those of the main script must be trusted.
    """
    plain = type(function) is types.FunctionType
    by_home = _home(function) == "__main__" and not with_arguments
    own = plain and (by_home or _is_trusted(function))
    return own or is_functional(function)
