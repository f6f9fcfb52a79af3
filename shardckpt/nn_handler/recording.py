"""The arguments of modules, noted when the modules are made.

A checkpoint says how a loss or a block was made, so load can make it anew. Attributes do not
tell: one may have the name of an argument and another value. So importing NNHandler puts a
`__new__` on torch.nn.Module that notes the arguments, by weak references to modules and tensors
among them. A copied or unpickled module was not made of arguments, and has none noted.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

__all__ = ["install", "recorded"]

_made: WeakKeyDictionary[nn.Module, tuple[Any, Any]] = WeakKeyDictionary()
_GONE = object()


def install() -> None:
    """Note the arguments of modules from now on."""
    if "__new__" in vars(nn.Module):
        return
    set_state: Any = nn.Module.__setstate__

    def new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        other: Any = super(nn.Module, cls).__new__  # of another base, where there is one
        made: nn.Module = other(cls) if other is object.__new__ else other(cls, *args, **kwargs)
        try:
            _made[made] = _weak(args), _weak(kwargs)
        except TypeError:  # a class without a hash
            pass
        return made

    def forget(self: nn.Module, state: Any) -> None:
        _made.pop(self, None)
        set_state(self, state)

    nn.Module.__new__ = new  # type: ignore[assignment,method-assign]
    nn.Module.__setstate__ = forget  # type: ignore[method-assign]


def recorded(module: nn.Module) -> dict[str, Any] | None:
    """The arguments by name that a module was made of; None if they are not known by name."""
    try:
        args, kwargs = _made[module]
        bound = inspect.signature(type(module)).bind(*_strong(args), **_strong(kwargs))
    except (KeyError, TypeError, ValueError):
        return None
    kinds = {n: p.kind for n, p in bound.signature.parameters.items()}
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if kinds[name] is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kinds[name] in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
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
