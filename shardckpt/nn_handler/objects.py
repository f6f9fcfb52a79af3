"""Classes, functions and objects by name: what a checkpoint holds in place of pickles."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from shardckpt.errors import CheckpointError, UnsupportedLeafError
from shardckpt.format import values

__all__ = ["build", "describe", "find", "name_of"]


def name_of(value: Any, *, at: str) -> str:
    """`module:qualname` of a class or function; UnsupportedLeafError if it can't be found so."""
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    found: Any = sys.modules.get(module or "")
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is not value:
        raise UnsupportedLeafError(
            "Something without an importable name can't be saved",
            tensor=at,
            expected="a class or function at the top level of a module",
            actual=repr(value),
            remedy="define it at the top level of a module, not as a lambda or inside a function",
        )
    return f"{module}:{qualname}"


def find(name: str, *, at: str, kind: type[Any] | None = None) -> Any:
    """The class or function of a name that name_of made; of the given kind, or CheckpointError."""
    module, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise _not_found(name, at, str(error)) from error
    if kind is not None and not (isinstance(found, type) and issubclass(found, kind)):
        raise _not_found(name, at, repr(found))
    return found


def _not_found(name: str, at: str, actual: str) -> CheckpointError:
    return CheckpointError(
        "The checkpoint names something that can't be imported",
        tensor=at,
        expected=name,
        actual=actual,
        remedy=f"put its module on the path, or pass {at}= to load",
    )


def describe(value: Any, *, at: str) -> dict[str, Any]:
    """A function by its name; an object by its class and the arguments it was made of.

    Arguments are read from attributes of the same name, as torch's losses have them.
    """
    if inspect.isroutine(value) or isinstance(value, type):
        return {"name": name_of(value, at=at)}
    kind = type(value)
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(kind).parameters.values():
        if hasattr(value, parameter.name):
            found = getattr(value, parameter.name)
            values.encode(None if hasattr(found, "shape") else found, at=f"{at}.{parameter.name}")
            arguments[parameter.name] = found
    return {"name": name_of(kind, at=at), "arguments": arguments}


def build(description: dict[str, Any], *, at: str) -> Callable[..., Any]:
    """What describe described."""
    found = find(description["name"], at=at)
    if "arguments" not in description:
        return found  # type: ignore[no-any-return]
    if not (isinstance(found, type) and (issubclass(found, nn.Module) or callable(found))):
        raise _not_found(description["name"], at, repr(found))
    return found(**description["arguments"])  # type: ignore[no-any-return]
