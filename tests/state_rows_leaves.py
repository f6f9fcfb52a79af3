"""Leaves that are no tensors, for the table of kinds of state: (name, make the state, equal).

`equal(saved, loaded, template)`: whether what was loaded is what was saved; with `template`, into
a state as `make` gives it, else anew by load_state.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import pathlib
import types
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

Row = tuple[str, Callable[[], Any], Callable[[Any, Any, bool], bool]]


@dataclasses.dataclass
class Progress:
    epoch: int = 3
    seen: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    lr: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)


class Pair(NamedTuple):
    a: Any
    b: Any


class Mode(enum.IntEnum):
    FAST = 1


def _same(saved: Any, loaded: Any, template: bool) -> bool:
    return type(saved) is type(loaded) and bool(saved == loaded)


def _equal(saved: Any, loaded: Any, template: bool) -> bool:
    return bool(saved == loaded)


def _fields(saved: Any, loaded: Any, template: bool) -> bool:
    right = type(saved) if template else types.SimpleNamespace
    return type(loaded) is right and repr(vars(saved)) == repr(vars(loaded))


def _array(saved: Any, loaded: Any, template: bool) -> bool:
    return saved.dtype == loaded.dtype and np.array_equal(saved, loaded)


def _content(saved: Any, loaded: Any, template: bool) -> bool:
    return type(saved) is type(loaded) and saved.getvalue() == loaded.getvalue()


def _generator(saved: Any, loaded: Any, template: bool) -> bool:
    state = loaded.get_state() if template else loaded
    return torch.equal(saved.get_state(), state)


def _tuple(saved: Any, loaded: Any, template: bool) -> bool:
    return tuple(saved) == loaded and type(loaded) is (type(saved) if template else tuple)


_UTC2 = datetime.timezone(datetime.timedelta(hours=2))
_VALUES = {
    "date": datetime.date(2024, 2, 29),
    "datetime": datetime.datetime(2024, 1, 1, 12, 30, 1, 7),
    "datetime with a zone": datetime.datetime(2024, 1, 1, tzinfo=_UTC2),
    "datetime in a fold": datetime.datetime(2024, 10, 27, 2, 30, fold=1),
    "time": datetime.time(1, 2, 3),
    "timedelta": datetime.timedelta(days=-1, microseconds=5),
    "Decimal": decimal.Decimal("-0.10"),
    "Fraction": fractions.Fraction(-1, 3),
    "UUID": uuid.UUID(int=7),
    "Ellipsis": ...,
    "None": None,
    "Path": pathlib.Path("a/b"),
    "set": {1, "a"},
    "frozenset": frozenset([b"x"]),
    "deque": collections.deque([1, (2,)], 4),
    "Counter": collections.Counter("aab"),
    "bytes": b"\0\1",
    "bytearray": bytearray(b"ab"),
    "complex": 1 + 2j,
    "range": range(1, 9, 2),
    "slice": slice(None, 3),
    "enum": Mode.FAST,
    "numpy scalar": np.float32(1.5),
    "big-endian numpy scalar": np.array([1.5], dtype=">f4")[0],
    "numpy bool": np.True_,
    "numpy time": np.datetime64("2024-01-01"),
    "numpy dtype": np.dtype("int16"),
    "torch.Size": torch.Size([2, 3]),
    "torch.dtype": torch.bfloat16,
    "torch.device": torch.device("cpu"),
    "memory_format": torch.channels_last,
    "layout": torch.strided,
    "qscheme": torch.per_tensor_affine,
}

ROWS: list[Row] = [
    *[(name, lambda value=value: value, _same) for name, value in _VALUES.items()],
    ("memoryview", lambda: memoryview(b"abc"), lambda a, b, t: bytes(a) == b),
    ("OrderedDict", lambda: collections.OrderedDict(b=1, a=2), _equal),
    ("defaultdict", lambda: collections.defaultdict(list, a=[1]), _equal),
    ("MappingProxy", lambda: types.MappingProxyType({"a": 1}), _equal),
    ("namedtuple", lambda: Pair(1, "x"), _tuple),
    ("dataclass", lambda: Progress(4, [1, (2,)]), _fields),
    ("dataclass with a tensor", lambda: Progress(4, torch.ones(2)), _fields),
    ("dataclass in a dataclass", lambda: Progress(seen=3, epoch=2), _fields),
    ("frozen dataclass", lambda: Frozen(0.25), lambda a, b, t: (a == b) is t),
    ("SimpleNamespace", lambda: types.SimpleNamespace(a=1, b={"c": 2}), _fields),
    ("argparse.Namespace", lambda: argparse.Namespace(lr=0.1, name="x"), _fields),
    ("array of text", lambda: np.array([["a", "bcd"]]), _array),
    ("array of bytes", lambda: np.array([b"a", b"bc"]), _array),
    ("array of times", lambda: np.array(["2024-01-01"], dtype="datetime64[D]"), _array),
    ("complex128 array", lambda: np.array([1 + 2j]), _array),
    ("BytesIO", lambda: io.BytesIO(b"abc"), _content),
    ("StringIO", lambda: io.StringIO("a\r\nb"), _content),
    ("Generator", lambda: torch.Generator().manual_seed(5), _generator),
]
