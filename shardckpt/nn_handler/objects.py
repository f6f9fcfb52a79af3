"""Classes, functions and objects by name, as a checkpoint holds them in place of pickles.

An object without an importable name is saved as absent: a save warns of it, and a load asks for it.
shardckpt.nn_handler.trust says what a name may resolve to.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from shardckpt.errors import CheckpointError, ShardckptError, StateError
from shardckpt.logs import warn
from shardckpt.nn_handler.bounds import Bounds
from shardckpt.nn_handler.recording import recorded, signature
from shardckpt.nn_handler.trust import (
    Slot,
    import_name,
    is_function,
    is_functional,
    is_torch_module,
    resolve_name,
)
from shardckpt.state.flatten import flatten
from shardckpt.state.module_state import has_state
from shardckpt.torch_compat import child_names

__all__ = ["Described", "Given", "NameResolver", "absent", "describe", "making", "warn_of_absent"]

Described = Any
"""Plain data, in which dicts with these keys describe classes, functions and objects."""

_IMPORT, _ARGUMENTS, _ABSENT = "shardckpt.import", "arguments", "shardckpt.absent"
_OWN = "shardckpt.own"
_HELD = "shardckpt_held"
_DDP = nn.parallel.DistributedDataParallel
_PATH, _PARTIAL, _ORDERED = "pathlib:Path", "functools:partial", "collections:OrderedDict"
_LONGEST_RANGE, _LISTED = 1 << 20, 50


def describe(
    value: Any, own: Mapping[int, str] | None = None, *, holds_tensors: bool = False
) -> Described:
    """Describe a value as plain data.

    Functions and classes are described by name, modules by their class and its arguments. A value
    that can't be described, such as a logger, is absent.

    `own`: the names of the handler's own parts by id, which are described by these names.
    `holds_tensors`: the checkpoint holds the tensors of modules that are part of the value. Without
    it, a module is absent if its arguments alone would give it other tensors.
    """
    inner = functools.partial(describe, own=own, holds_tensors=holds_tensors)
    if own is not None and id(value) in own:
        return {_OWN: own[id(value)]}
    if own is not None and isinstance(value, _DDP) and id(value.module) in own:
        return {_OWN: "model"}  # an earlier wrapper of the model
    value = getattr(value, _HELD, value) if is_function(value) else value
    if type(value) is dict:
        return {key: inner(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(inner(item) for item in value)
    if type(value) is OrderedDict:
        return {_IMPORT: _ORDERED, _ARGUMENTS: inner([list(pair) for pair in value.items()])}
    if type(value) is functools.partial:
        parts = {"function": value.func, "args": list(value.args), "keywords": value.keywords}
        return {_IMPORT: _PARTIAL, _ARGUMENTS: inner(parts)}
    if isinstance(value, PurePath):
        return {_IMPORT: _PATH, _ARGUMENTS: [str(value)]}
    if inspect.isroutine(value) or isinstance(value, type):
        name = import_name(value)
        return {_ABSENT: _text(value)} if name is None else {_IMPORT: name}
    if isinstance(value, nn.Module) or (callable(value) and not has_state(value)):
        cls = type(value)
        name, arguments = import_name(cls), _arguments(value)
        if name is None or arguments is None:
            return {_ABSENT: _text(value)}
        if not holds_tensors and isinstance(value, nn.Module) and _has_more(value, arguments, own):
            return {_ABSENT: _text(value)}
        return {_IMPORT: name, _ARGUMENTS: inner(arguments)}
    return value if _is_plain(value) else {_ABSENT: _text(value)}


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold the value itself, and not only what is in it."""
    if has_state(value) or dataclasses.is_dataclass(value):
        return False
    if isinstance(value, (torch.Generator, Mapping)) or hasattr(value, "_make"):
        return False
    try:
        flatten({"value": value}, rank=0)
    except ShardckptError:
        return False
    return True


def _has_more(module: nn.Module, arguments: Any, own: Mapping[int, str] | None) -> bool:
    """Whether a module has tensors besides those in its arguments and those of the handler."""
    items = arguments.values() if isinstance(arguments, dict) else arguments
    given = [item for item in items if isinstance(item, torch.Tensor)]
    return any(
        id(tensor) not in (own or {}) and not any(_equal(tensor, item) for item in given)
        for tensor in module.state_dict(keep_vars=True).values()
        if isinstance(tensor, torch.Tensor)
    )


def _equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (tensor.shape, tensor.dtype, type(other)) == (other.shape, other.dtype, torch.Tensor)
    return alike and torch.equal(tensor, other.to(tensor.device))


def _text(value: Any) -> str:
    return " ".join(repr(value).split())[:200]


def _arguments(value: Any) -> dict[str, Any] | list[Any] | None:
    """Return the arguments of an object; None if they are unknown."""
    if type(value) is nn.Sequential:
        numbered = [str(number) for number in range(len(value))] == child_names(value)
        return list(value) if numbered else None
    if type(value) in (nn.ModuleList, nn.ModuleDict):
        return {"modules": list(value) if type(value) is nn.ModuleList else dict(value.items())}
    if isinstance(value, nn.Module):
        made = recorded(value)
        return _of_torch(value, made or {}) if is_torch_module(type(value)) else made
    if dataclasses.is_dataclass(value) and not hasattr(value, "__post_init__"):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    plain = type(value).__init__ is object.__init__ and not vars(value)
    return {} if plain else None


def _of_torch(value: nn.Module, made: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a module of torch.

    They are its attributes of the same names, which classes of torch keep. Arguments that were
    noted replace attributes that are missing, lists, which torch extends, and modules that torch
    makes of numbers.
    """
    arguments: dict[str, Any] = {}
    recurrent = isinstance(value, (nn.LSTM, nn.GRU))  # which take any arguments, for RNNBase
    parameters = dict(signature(nn.RNNBase if recurrent else type(value)).parameters)
    if recurrent:
        del parameters["mode"]
    for name, parameter in parameters.items():
        noted = made.get(name, parameter.default)
        found = getattr(value, name, parameter.empty)
        is_flag = type(parameter.default) is bool
        if found is not parameter.empty and is_flag and type(found) is not bool:
            arguments[name] = found is not None  # the bias of a Linear
            continue
        changed = isinstance(found, nn.Module) and not isinstance(noted, nn.Module)
        kept = noted if found is parameter.empty or type(found) is list or changed else found
        if kept is parameter.empty:
            return None
        if kept is not parameter.default:
            arguments[name] = kept
    return arguments


def absent(described: Described, at: str) -> dict[str, str]:
    """Return the texts of the absent objects in a description, by their places."""
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
    """Warn of each absent object that is not in `known`, and add it."""
    for name, text in absent(described, "").items():
        if name not in known:
            known.add(name)
            warn(
                f"{name} is not in the checkpoint: {text} has no importable name, its arguments "
                "are not plain values, or it has tensors of its own. Pass it to load: "
                f"objects={{{name!r}: ...}}. To save it by name, define it at the top level of a "
                "module, with plain values as arguments"
            )


@contextmanager
def making(at: str, path: str) -> Iterator[None]:
    """Turn errors of objects that are created from a checkpoint into CheckpointErrors."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ShardckptError) and not isinstance(error, StateError):
            error.tensor = error.tensor or at
            raise
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            "A part of the handler can't be created from the checkpoint",
            path=path,
            tensor=at,
            actual=error.message if isinstance(error, StateError) else text,
            remedy=_remedy(at),
        ) from error


def _remedy(at: str) -> str:
    """Return the remedy for a part of a checkpoint that can't be created."""
    part, _, name = at.partition(".")
    ways = {
        **{p: f"load with skip_{p}=True" for p in ("optimizer", "scheduler", "callbacks", "ema")},
        "model": 'give it to load: model_class=..., objects={"model.kwargs": {...}}',
        "loss_fn": "give it to load: loss_fn=...",
        "metrics": f"give it to load: metrics={{{name!r}: ...}}",
        "optimizers": "load with skip_optimizer=True",
        "loss_arguments": f"give it to load: objects={{{at!r}: ...}}",
        "auto_saver": 'leave it out of the load: objects={"auto_saver": None}',
        "compile": 'leave it out of the load: objects={"compile": None}',
    }
    return ways.get(part, "take the weights alone with NNHandler.initialize_from_checkpoint")


@dataclass(frozen=True, slots=True)
class Given:
    """An object that the caller gave to load, or that a name resolved to."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Instance:
    """An instance of a class, to be created when all names are resolved."""

    cls: Any
    arguments: Any
    at: str


@dataclass(frozen=True, slots=True)
class _Own:
    """A part of the handler, such as its model."""

    name: str
    at: str


@dataclass(frozen=True, slots=True)
class _Call:
    """A partial function or an OrderedDict, to be created when all names are resolved."""

    cls: Callable[..., Any]
    args: Any
    keywords: Any


class _Gate:
    """Whether functions that a checkpoint names may be called."""

    is_open = False


class NameResolver:
    """Resolves all names in a checkpoint, and then creates the objects.

    `given` holds objects by place, such as "loss_fn" or "model.kwargs.block". `bounds` limits the
    size of modules. Functions among the arguments of constructors can't be called before `open`.
    `own_part` finds a part of the handler by its name; it is set when the model exists.
    """

    def __init__(self, given: Mapping[str, Any], bounds: Bounds, *, path: str) -> None:
        self.given, self.bounds, self.path = given, bounds, path
        self.missing: dict[str, str] = {}
        self.used: set[str] = set()
        self.own_part: Callable[[str], Any] = lambda name: None
        self._gate = _Gate()

    def open(self) -> None:
        """Allow calls of functions, at the end of the load."""
        self._gate.is_open = True

    def resolve(self, described: Described, at: str, slot: Slot = Slot.ARGUMENT) -> Any:
        """Build a tree for `make`. Names that do not resolve are added to `missing`."""
        if (given := self.given_at(at)) is not None:
            return given
        if type(described) is dict:
            if _ABSENT in described:
                return self._miss(at, str(described[_ABSENT]))
            if _OWN in described:
                if type(described[_OWN]) is not str or at.startswith("model."):
                    raise self._malformed(at, "the name of a part of the handler", described)
                return _Own(described[_OWN], at)
            if _IMPORT in described:
                return self._named(described, at, slot)
            return {k: self.resolve(item, f"{at}.{k}") for k, item in described.items()}
        if type(described) in (list, tuple):
            items = [self.resolve(item, f"{at}.{i}") for i, item in enumerate(described)]
            return type(described)(items)
        if type(described) is range and described[_LONGEST_RANGE:]:
            raise self._malformed(at, f"a range of at most {_LONGEST_RANGE} numbers", described)
        return described

    def given_at(self, at: str) -> Given | None:
        """Return the object that the caller passed for a place."""
        if at not in self.given:
            return None
        self.used.add(at)
        return Given(self.given[at])

    def _named(self, described: dict[Any, Any], at: str, slot: Slot) -> Any:
        name, arguments = described[_IMPORT], described.get(_ARGUMENTS)
        instance = _ARGUMENTS in described
        if type(name) is not str or not described.keys() <= {_IMPORT, _ARGUMENTS}:
            raise self._malformed(at, 'a name as "module:class"', described)
        if instance and type(arguments) not in (dict, list):
            raise self._malformed(at, "arguments in a dict or a list", arguments)
        if (name, slot, instance) == (_PATH, Slot.ARGUMENT, True):
            if type(arguments) is not list or [type(part) for part in arguments] != [str]:
                raise self._malformed(at, "a path as one str", arguments)
            return Given(Path(arguments[0]))
        if instance and name == _PARTIAL:
            return self._partial(arguments, at, slot)
        if (name, slot, instance) == (_ORDERED, Slot.ARGUMENT, True):
            return self._ordered(arguments, at)
        found = resolve_name(name, slot, instance=instance)
        tree = self.resolve(arguments, f"{at}.arguments") if instance else None
        if found is None:
            return self._miss(at, name)
        if instance:
            return _Instance(found, tree, at)
        held = is_function(found) and slot is Slot.ARGUMENT
        return Given(self._held(found, at) if held else found)

    def _partial(self, described: Any, at: str, slot: Slot) -> Any:
        """Resolve a partial of a class or function. One of the main script must be trusted too."""
        keys = {"function": dict, "args": list, "keywords": dict}
        if type(described) is not dict or {k: type(v) for k, v in described.items()} != keys:
            raise self._malformed(at, f"a dict of {', '.join(keys)}", described)
        inner = f"{at}.{_ARGUMENTS}"
        args = self.resolve(described["args"], f"{inner}.args")
        keywords = self.resolve(described["keywords"], f"{inner}.keywords")
        function = self.given_at(f"{inner}.function")
        if function is None:
            name = described["function"].get(_IMPORT)
            plain = type(name) is str and described["function"].keys() == {_IMPORT}
            found = resolve_name(name, slot, instance=False, with_arguments=True) if plain else None
            if found is None:
                return self._miss(f"{inner}.function", str(name or described["function"]))
            held = is_function(found) and slot is Slot.ARGUMENT
            function = Given(self._held(found, at) if held else found)
        return _Call(functools.partial, [function, *args], keywords)

    def _ordered(self, described: Any, at: str) -> Any:
        pairs = type(described) is list and all(
            type(pair) is list and len(pair) == 2 and type(pair[0]) in (str, int)
            for pair in described
        )
        if not pairs:
            raise self._malformed(at, "a list of pairs of a key and a value", described)
        return _Call(OrderedDict, [self.resolve(described, f"{at}.{_ARGUMENTS}")], {})

    def _miss(self, at: str, text: str) -> None:
        self.missing[at] = (text if text.isprintable() else repr(text))[:200]

    def _malformed(self, at: str, expected: str, actual: Any) -> CheckpointError:
        return CheckpointError(
            "The configuration in the checkpoint is malformed",
            path=self.path,
            tensor=f"config.{at}",
            expected=expected,
            actual=repr(actual)[:200],
            remedy=f"give it to load: objects={{{at!r}: ...}}",
        )

    def _held(self, function: Callable[..., Any], at: str) -> Callable[..., Any]:
        """Wrap a function so that it can't be called before the end of the load.

        A scheduler calls its function for a factor when it is created. The factor is 1 then, and
        the saved state replaces it.
        """
        if is_functional(function) and not at.startswith("scheduler."):
            return function  # modules of torch compare functions by identity

        gate, path = self._gate, self.path  # not self, which holds the checkpoint

        @functools.wraps(function)
        def held(*args: Any, **kwargs: Any) -> Any:
            if gate.is_open:
                return function(*args, **kwargs)
            if at.startswith("scheduler."):
                return 1.0
            raise CheckpointError(
                "A function that the checkpoint names was about to be called while loading",
                path=path,
                tensor=at,
                actual=import_name(function),
                remedy=f"if it may be called, give it to load: objects={{{at!r}: ...}}",
            )

        setattr(held, _HELD, function)
        return held

    def raise_missing(self, unused: Collection[str] = ()) -> None:
        """Raise one CheckpointError for all names that did not resolve.

        `unused`: places of objects that were given, and that the checkpoint does not have.
        """
        if not self.missing:
            return
        parts = {at.partition(".")[0] for at in self.missing}
        wanted = list(self.missing)[:_LISTED]
        more = f", and {len(self.missing) - _LISTED} more" if len(self.missing) > _LISTED else ""
        ways = [f"objects={{{', '.join(f'{at!r}: ...' for at in wanted)}}}"]
        ways += ["model_class=..."] if "model.class" in self.missing else []
        parts |= {"optimizer"} if "optimizers" in parts else set()
        ways += [f"skip_{part}=True" for part in ("optimizer", "scheduler") if part in parts]
        ways += ["skip_callbacks=True"] if "callbacks" in parts else []
        named = {n.partition(":")[0] for n in self.missing.values() if ":" in n}
        modules = sorted(filter(_importable, named))[:_LISTED]
        first = [f"import {name}" for name in modules if name not in sys.modules]
        first += [f"shardckpt.trust({name!r})" for name in modules]
        raise CheckpointError(
            "The checkpoint names classes or functions that this program has not given, imported "
            "or trusted",
            path=self.path,
            tensor=", ".join(wanted) + more,
            expected=", ".join(f"{at}: {self.missing[at]}" for at in wanted) + more,
            actual=f"objects= gives {', '.join(sorted(unused))}, which the checkpoint does not have"
            if unused
            else None,
            remedy="give them to load: "
            + " or ".join(ways)
            + (f"; or, if you trust it, call load after {', '.join(first)}" if first else ""),
        )

    def make(self, tree: Any, at: str) -> Any:
        """Create the objects of a tree whose names are all resolved."""
        with making(at, self.path):
            return self._make(tree)

    def _make(self, tree: Any) -> Any:
        if type(tree) is Given:
            return tree.value
        if type(tree) is dict:
            return {key: self._make(item) for key, item in tree.items()}
        if type(tree) in (list, tuple):
            return type(tree)(self._make(item) for item in tree)
        if type(tree) is _Call:
            return tree.cls(*self._make(tree.args), **self._make(tree.keywords))
        if type(tree) is _Own:
            found = self.own_part(tree.name)
            if found is None:
                raise CheckpointError(
                    "The checkpoint names a part of the handler that this handler does not have",
                    path=self.path,
                    tensor=tree.at,
                    actual=repr(tree.name)[:200],
                    remedy=_remedy(tree.at),
                )
            return found
        if type(tree) is not _Instance:
            return tree
        with making(tree.at, self.path):
            arguments = self._make(tree.arguments)
            listed = arguments if type(arguments) is list else []
            named = arguments if type(arguments) is dict else {}
            return self.bounds.construct(tree.cls, listed, named)


def _importable(module: str) -> bool:
    """Whether a message may ask the user to import or trust a module."""
    top = module.partition(".")[0]
    names = all(part.isidentifier() for part in module.split("."))
    return names and top not in ("__main__", "torch", "shardckpt", *sys.stdlib_module_names)
