"""Classes, functions and objects by name: what a checkpoint holds in place of pickles.

Whatever has no importable name is noted as absent: saving warns of it, and loading asks for it.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from torch import nn

from shardckpt.errors import CheckpointError
from shardckpt.state.module_state import has_state

__all__ = ["Described", "build", "describe", "find", "import_name", "warn_of_absent"]

Described = Any
"""Plain data in which these stand for classes, functions and objects."""

_IMPORT, _ARGUMENTS, _ABSENT = "shardckpt.import", "arguments", "shardckpt.absent"


def import_name(value: Any) -> str | None:
    """`module:qualname` of a class or function; None if it can't be found so."""
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    found: Any = sys.modules.get(module or "")
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return f"{module}:{qualname}" if found is value else None


def find(name: str, *, at: str) -> Any:
    """The class or function of a name that import_name made, or CheckpointError."""
    module, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(
            "The checkpoint names something that can't be imported",
            tensor=at,
            expected=name,
            actual=str(error),
            remedy=f"put its module on the path, or give it to load: objects={{{at!r}: ...}}",
        ) from error
    return found


def describe(value: Any) -> Described:
    """Plain data for a value: functions and classes by name, losses and the like by class and
    arguments, which are read from attributes of the same name as torch's classes have them."""
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(describe(item) for item in value)
    if isinstance(value, PurePath):
        return {_IMPORT: "pathlib:Path", _ARGUMENTS: [str(value)]}
    if inspect.isroutine(value) or isinstance(value, type):
        name = import_name(value)
        return {_ABSENT: repr(value)} if name is None else {_IMPORT: name}
    if isinstance(value, nn.Module) or (callable(value) and not has_state(value)):
        kind = type(value)
        name, arguments = import_name(kind), _arguments(value)
        if name is None or arguments is None:
            return {_ABSENT: repr(value)}
        return {_IMPORT: name, _ARGUMENTS: describe(arguments)}
    return value


def _arguments(value: Any) -> dict[str, Any] | None:
    """What an object was made of; None if that is not to be seen on it."""
    arguments: dict[str, Any] = {}
    try:
        parameters = inspect.signature(type(value)).parameters
    except ValueError:
        return None
    for parameter in parameters.values():
        if hasattr(value, parameter.name):
            arguments[parameter.name] = getattr(value, parameter.name)
        elif not type(value).__module__.startswith("torch."):
            return None
    return arguments


def absent(described: Described, at: str) -> dict[str, str]:
    """Name -> text of everything absent in a description."""
    if isinstance(described, Mapping):
        if _ABSENT in described:
            return {at: described[_ABSENT]}
        items: Any = described.items()
    elif isinstance(described, (list, tuple)):
        items = enumerate(described)
    else:
        return {}
    return {n: t for key, item in items for n, t in absent(item, f"{at}.{key}".lstrip(".")).items()}


def warn_of_absent(described: Described, known: set[str]) -> None:
    """One warning for each thing absent that is not in `known`, which then knows it."""
    for name, text in absent(described, "").items():
        if name not in known:
            known.add(name)
            warnings.warn(
                f"{name}, which is {text}, has no importable name: it is not in the checkpoint, "
                f"and load will ask for it, as objects={{{name!r}: ...}}. Define it at the top "
                "level of a module to have it saved by name",
                stacklevel=2,
            )


def build(described: Described, *, at: str, given: Mapping[str, Any]) -> Any:
    """What describe described; `given` stands in, by name, for what can't be imported."""
    if at in given:
        return given[at]
    if isinstance(described, Mapping):
        if _ABSENT in described:
            raise CheckpointError(
                "The checkpoint does not hold something that has no importable name",
                tensor=at,
                expected=described[_ABSENT],
                remedy=f"give it to load: objects={{{at!r}: ...}}",
            )
        if _IMPORT in described:
            found = find(described[_IMPORT], at=at)
            if _ARGUMENTS not in described:
                return found
            arguments = build(described[_ARGUMENTS], at=f"{at}.arguments", given=given)
            return found(*arguments) if isinstance(arguments, list) else found(**arguments)
        return {k: build(item, at=f"{at}.{k}", given=given) for k, item in described.items()}
    if type(described) in (list, tuple):
        items = [build(item, at=f"{at}.{i}", given=given) for i, item in enumerate(described)]
        return type(described)(items)
    return described
