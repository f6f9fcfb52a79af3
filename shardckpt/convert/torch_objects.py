"""Read torch files that hold objects beside tensors. Entries that can't be read are listed.

torch.load(weights_only=True) refuses a complete file because of one object in it, such as a
Namespace in a Lightning checkpoint, or the random-number state of numpy in that of a Trainer. Here
inert stand-ins replace the classes and functions that the file names; torch.load accepts them by
its public safe_globals. Nothing that a file names is imported or called. Some stand-ins have a
plain form, which is converted: arrays and numbers of numpy, paths, namespaces, and subclasses of
dict and list. Entries that hold other objects are left out.

The safe globals belong to the process. If torch.load in another thread meets a stand-in, it raises
the error that it would raise without them. If they are removed between its check and its look-up,
it raises a KeyError.
"""

from __future__ import annotations

import itertools
import math
import pickle
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

from shardckpt.convert.refusals import is_harmful, refused_name, wrong_container
from shardckpt.errors import StateError
from shardckpt.format import typed_json as values
from shardckpt.state.flatten import flatten
from shardckpt.state.saved_tree import below

__all__ = ["ObjectsLoader", "StandIn", "stand_in", "why"]

_MOST_PASSES = 20
"""The maximum number of passes over a pickle. Names that the pickle builds while it runs are
learned one in each pass, the others at once."""
_ARRAY_DTYPE = re.compile(r"[<>|=]?[biufc][0-9]{1,2}")
_AS_DICT = {"argparse.Namespace", "types.SimpleNamespace"}
_AS_TEXT = {"torch.torch_version.TorchVersion"}
_AS_NUMBER = {"deepspeed.runtime.zero.config.ZeroStageEnum"}
_PATH = re.compile(r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path")


class StandIn:
    """Stands for an object of a class that is not loaded: its name and its arguments."""

    name: ClassVar[str] = ""
    thread: ClassVar[int] = 0
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> Any:  # noqa: D102
        if threading.get_ident() != cls.thread:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {cls.name}")
        made = object.__new__(cls)
        made.args = args
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _TensorStandIn(torch.Tensor):
    """Stands for a subclass of Tensor. A tensor of it is never made, only viewed as one of it."""

    class_name: ClassVar[str] = ""
    thread: ClassVar[int] = 0

    def __new__(cls, *_: Any, **__: Any) -> Any:
        raise pickle.UnpicklingError(f"Trying to call reduce for {cls.class_name}")

    def __setstate__(self, state: Any) -> None:
        if threading.get_ident() != self.thread:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {self.class_name}")


def stand_in(name: str, args: Sequence[Any] = (), state: Any = None) -> StandIn:
    """Return what stands for an object of the class `name`, or for the result of a function."""
    cls = type("StandIn", (StandIn,), {"name": name, "thread": threading.get_ident()})
    made: StandIn = object.__new__(cls)
    made.args, made.state = tuple(args), state
    return made


class ObjectsLoader:
    """Loads a torch file, or an entry of DCP, with stand-ins. `plain` converts the result.

    `left_out` are the entries that could not be converted, with reasons; `changed` those that have
    another form. Not thread-safe.
    """

    def __init__(self, containers: Mapping[int, tuple[Any, str]] | None = None) -> None:
        self.left_out: dict[str, str] = {}
        self.changed: dict[str, str] = {}
        self._stand_ins: dict[str, type[Any]] = {}
        self._numbers = itertools.count()
        self._containers: dict[int, tuple[Any, str]] = dict(containers or {})
        self._done: dict[int, Any] = {}
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            self._add(f"{module}._reconstruct")
            self._add(f"{module}.scalar")
        self._add("numpy.ndarray")
        self._add("numpy.dtype")

    def load(
        self, file: str | BinaryIO, mmap: bool = False, tensor_classes: Iterable[str] = ()
    ) -> Any:
        """Call torch.load with stand-ins. Raises its errors for files that are corrupted or that
        call the operating system. `tensor_classes` are the subclasses of Tensor in the file."""
        for name in tensor_classes:
            if name in self._stand_ins or is_harmful(name):
                continue
            fields = {"class_name": name, "thread": threading.get_ident()}
            self._stand_ins[name] = type("TensorStandIn", (_TensorStandIn,), fields)
        self._learn_names(file)
        for passes in range(_MOST_PASSES, -1, -1):
            if not isinstance(file, str):
                file.seek(0)
            known = {_full_name(item) for item in torch.serialization.get_safe_globals()}
            added = [(made, name) for name, made in self._stand_ins.items() if name not in known]
            try:
                with torch.serialization.safe_globals(added):  # type: ignore[arg-type]
                    return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
            except pickle.UnpicklingError as error:
                if not passes or not self._learn(error):
                    raise
        raise AssertionError("the last pass returns or raises")

    def _learn_names(self, file: str | BinaryIO) -> None:
        """Learn the names of the classes in a file, as far as torch finds them without loading
        it.
        """
        with suppress(Exception):
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(file):
                if name not in self._stand_ins and not is_harmful(name):
                    self._add(name)

    def _learn(self, error: Exception) -> bool:
        """Add a stand-in for a class, or make it a subclass of dict or list.

        Returns:
            Whether anything is new.
        """
        if name := refused_name(error):
            if name in self._stand_ins or is_harmful(name):
                return False
            self._add(name)
            return True
        if found := re.search(r"Can only build .* got <class 'numpy\.dtypes\.(\w+)'>", str(error)):
            name = f"numpy.dtypes.{found[1]}"  # a numpy.dtype that the program has allowed
            known = name in self._stand_ins
            self._stand_ins[name] = getattr(np.dtypes, found[1])
            return not known
        container, class_name = wrong_container(error) or ("", "")
        for name, made in self._stand_ins.items():
            if f"{made.__module__}.{made.__qualname__}" == class_name:
                self._add(name, OrderedDict if container == "dict" else list)
                return True
        return False

    def _add(self, name: str, container: Callable[[], Any] | None = None) -> None:
        fields: dict[str, Any] = {"name": name, "thread": threading.get_ident()}
        if container is not None:

            def new(cls: type[StandIn], *args: Any, **kwargs: Any) -> Any:
                StandIn.__new__(cls)  # for its check
                made = container()
                self._containers[id(made)] = made, name
                return made

            fields["__new__"] = new
        self._stand_ins[name] = type(f"StandIn{next(self._numbers)}", (StandIn,), fields)

    def plain(self, value: Any, name: str) -> Any:
        """Convert the entry `name` of what `load` returned to plain values. Returns a StandIn if
        none can be converted. Entries of dicts are left out one by one, a list or tuple with all
        its items."""
        if id(value) in self._containers:
            self.changed[name] = f"{self._containers[id(value)][1]}, taken as {_type_name(value)}"
        is_dict = isinstance(value, Mapping) and not isinstance(value, Counter)  # a single value
        if is_dict or type(value) in (list, tuple):
            if id(value) not in self._done:
                self._done[id(value)] = value, _Cycle  # a container that contains itself
                self._done[id(value)] = value, self._items(value, name)
            result = self._done[id(value)][1]
            if result is _Cycle:
                raise StateError("A container contains itself", tensor=name)
            return result
        if isinstance(value, StandIn):
            return self._taken(value, name)
        if isinstance(value, type) and issubclass(value, (StandIn, _TensorStandIn)):
            return _left(f"the class or function {_key_text(value)}")
        if isinstance(value, _TensorStandIn):
            self.changed[name] = f"{value.class_name}, taken as a tensor"
            value = value.as_subclass(torch.Tensor)
        try:
            if isinstance(value, (torch.Tensor, np.ndarray)):
                flatten({"tensor": value}, rank=0)
            else:
                values.encode(value, at=name)
        except StateError as error:
            return _left(f"{error.message} ({error.actual})")
        return value

    def _items(self, value: Any, name: str) -> Any:
        if not isinstance(value, Mapping):
            items = [self.plain(item, below(name, place)) for place, item in enumerate(value)]
            lost = next((item for item in items if _is_lost(item)), None)
            return type(value)(items) if lost is None else lost
        kept: dict[Any, Any] = {}
        for key, item in value.items():
            inner = below(name, _key_text(key))
            found = self.plain(item, inner)
            lost = next((part for part in (self.plain(key, inner), found) if _is_lost(part)), None)
            if lost is None:
                kept[key] = found
            else:
                self.left_out[inner] = why(lost)
        return kept

    def _taken(self, made: StandIn, name: str) -> Any:
        """Return the plain form of an object, if its class has one. Otherwise the object itself."""
        try:
            if made.name == "numpy.ndarray" or made.name.endswith("multiarray._reconstruct"):
                return _array(made)
            if made.name.endswith("multiarray.scalar") and made.name.startswith("numpy"):
                dtype, raw = made.args
                return np.frombuffer(raw, dtype=_dtype(dtype), count=1)[0]
            if made.name == "builtins.bytes" and not made.args:  # how a pickle encodes b""
                return b""
            if made.name in _AS_TEXT:
                return str(made.args[0])
            if made.name in _AS_NUMBER:
                return int(made.args[0])
            if _PATH.fullmatch(made.name):
                self.changed[name] = f"{made.name}, taken as text"
                return "/".join(map(str, made.args)).replace("//", "/")
            if made.name in _AS_DICT and isinstance(made.state, dict):
                self.changed[name] = f"{made.name}, taken as dict"
                return self.plain(made.state, name)
        except (ValueError, TypeError, IndexError) as error:
            return _left(f"an object of {made.name} that can't be read ({error})")
        return made


class _Cycle(StandIn):
    """Marks a container that is being converted."""


def why(lost: StandIn) -> str:
    """Return the reason why an entry is left out."""
    return lost.state if type(lost) is StandIn else f"holds an object of {lost.name}"


def _left(reason: str) -> StandIn:
    made: StandIn = object.__new__(StandIn)
    made.state = reason
    return made


def _is_lost(value: Any) -> bool:
    return isinstance(value, StandIn)


def _type_name(value: Any) -> str:
    return "list" if isinstance(value, list) else "dict"


def _key_text(key: Any) -> str:
    if isinstance(key, type) and issubclass(key, _TensorStandIn):
        return key.class_name
    is_class = isinstance(key, type) and issubclass(key, StandIn)
    return key.name if isinstance(key, StandIn) or is_class else str(key)


def _full_name(item: Any) -> str:
    return item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"


def _dtype(made: Any) -> np.dtype[Any]:
    """Parse a dtype of numbers. Raises ValueError for others, such as object."""
    # This is a dtype of numpy if the program has allowed torch to load it.
    if isinstance(made, np.dtype) and made.kind in "biufc":
        return made
    text, order = made.args[0], "=" if made.state is None else made.state[1]
    if not isinstance(text, str) or not _ARRAY_DTYPE.fullmatch(text):
        raise ValueError(f"a numpy array of dtype {text!r}")
    return np.dtype(order + text if order in ("<", ">") and text[0].isalpha() else text)


def _array(made: StandIn) -> Any:
    """Build a numpy array from its pickled arguments; not larger than its bytes in the file."""
    _, shape, dtype, fortran, raw = made.state
    empty = isinstance(raw, StandIn)  # the arguments of bytes()
    found = np.empty(0, _dtype(dtype)) if empty else np.frombuffer(raw, _dtype(dtype))
    if math.prod(shape) != found.size:
        raise ValueError(f"{found.size} elements for the shape {shape}")
    array = found.reshape(shape, order="F" if fortran else "C")
    return np.array(array, dtype=array.dtype.newbyteorder("="))
