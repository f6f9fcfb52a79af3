"""The constructor arguments of modules.

A checkpoint holds the arguments of a loss and of modules among the arguments of a model, so that
load can create them again. Attributes are not enough: an attribute can have the name of an argument
and another value. Users create these modules before a handler sees them. So the import of NNHandler
sets `torch.nn.Module.__new__`, which notes the arguments of each module that is created later.

Nothing else changes: the arguments are kept outside of the module, in a dict by its identity, with
weak references to the module, and to the modules and tensors among the arguments. Modules that were
copied or unpickled have no arguments. `import shardckpt` alone sets nothing.
tests/nn_handler/test_recording.py shows all this.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import ref

import torch
from torch import nn

__all__ = ["install", "recorded", "signature"]

# By id: a module's __hash__ may need what its __init__ sets, and the module is new here.
_made: dict[int, tuple[ref[nn.Module], Any, Any]] = {}
_GONE = object()


def install() -> None:
    """Note the arguments of all modules that are created from now on."""
    if "__new__" in vars(nn.Module):
        return
    set_state: Any = nn.Module.__setstate__
    drop = _made.pop

    def new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        other: Any = super(nn.Module, cls).__new__  # that of another base class, if there is one
        made: nn.Module = other(cls) if other is object.__new__ else other(cls, *args, **kwargs)
        at = id(made)
        _made[at] = ref(made, lambda gone: drop(at, None)), _weak(args), _weak(kwargs)
        return made

    def forget(self: nn.Module, state: Any) -> None:
        drop(id(self), None)
        set_state(self, state)

    nn.Module.__new__ = new  # type: ignore[assignment,method-assign]
    nn.Module.__setstate__ = forget  # type: ignore[method-assign]


def signature(cls: type) -> inspect.Signature:
    """Return the signature of a constructor.

    For modules, inspect.signature(cls) of Python 3.11.2 and earlier returns that of `new`, which
    takes any arguments.
    """
    if not issubclass(cls, nn.Module) or cls.__new__ is not nn.Module.__new__:
        return inspect.signature(cls)
    found = inspect.signature(cls.__init__)
    return found.replace(parameters=[*found.parameters.values()][1:])


def recorded(module: nn.Module) -> dict[str, Any] | None:
    """Return the arguments of a module by name. None if they are unknown or have no names."""
    try:
        _, args, kwargs = _made[id(module)]
        bound = signature(type(module)).bind(*_strong(args), **_strong(kwargs))
    except (KeyError, TypeError, ValueError):
        return None
    parameter_kinds = {n: p.kind for n, p in bound.signature.parameters.items()}
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if parameter_kinds[name] is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif parameter_kinds[name] in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.POSITIONAL_ONLY,
        ):
            return None
        else:
            found[name] = value
    return None if _holds_gone(found) else found


def _weak(value: Any) -> Any:
    if isinstance(value, (nn.Module, torch.Tensor)):
        return ref(value)
    if type(value) is dict:
        return {key: _weak(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_weak(item) for item in value)
    return value


def _strong(value: Any) -> Any:
    if isinstance(value, ref):
        found = value()
        return _GONE if found is None else found
    if type(value) is dict:
        return {key: _strong(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_strong(item) for item in value)
    return value


def _holds_gone(value: Any) -> bool:
    if type(value) is dict:
        return any(map(_holds_gone, value.values()))
    return any(map(_holds_gone, value)) if type(value) in (list, tuple) else value is _GONE
