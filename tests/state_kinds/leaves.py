"""Rows: leaves that are not tensors."""

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

from tests.state_kinds.registry import row


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
    SLOW = 0
    FAST = 1


_ZONE = datetime.timezone(datetime.timedelta(hours=2))
_VALUES: dict[str, Callable[[int], Any]] = {
    "None": lambda n: None,
    "bool": lambda n: bool(n),
    "int beyond 53 bits": lambda n: (1 << 70) + n,
    "float that is not finite": lambda n: [float("inf"), -float("inf"), -0.0, 0.5 + n],
    "text with a lone surrogate": lambda n: f"\ud800{n}",
    "date": lambda n: datetime.date(2024 + 4 * n, 2, 29),
    "datetime": lambda n: datetime.datetime(2024, 1, 1, 12, 30, 1, n),
    "datetime with a zone": lambda n: datetime.datetime(2024, 1, 1 + n, tzinfo=_ZONE),
    "datetime in a fold": lambda n: datetime.datetime(2024, 10, 27, 2, 30, fold=n),
    "time": lambda n: datetime.time(1, 2, n),
    "timedelta": lambda n: datetime.timedelta(days=-1, microseconds=n),
    "Decimal": lambda n: decimal.Decimal(f"-0.{n}0"),
    "Fraction": lambda n: fractions.Fraction(-1, 3 + n),
    "UUID": lambda n: uuid.UUID(int=n),
    "Ellipsis": lambda n: ...,
    "Path": lambda n: pathlib.Path(f"a/{n}"),
    "set": lambda n: {n, "a"},
    "frozenset": lambda n: frozenset([bytes([n])]),
    "deque": lambda n: collections.deque([n, (2,)], 4),
    "Counter": lambda n: collections.Counter("aab" * n),
    "bytes": lambda n: bytes([0, n]),
    "bytearray": lambda n: bytearray([97, n]),
    "complex": lambda n: complex(n, 2),
    "range": lambda n: range(n, 9, 2),
    "slice": lambda n: slice(None, n),
    "enum": lambda n: Mode(n),
    "numpy scalar": lambda n: np.float32(1.5 + n),
    "big-endian numpy scalar": lambda n: np.array([1.5 + n], dtype=">f4")[0],
    "numpy bool": lambda n: np.bool_(n),
    "numpy time": lambda n: np.datetime64(f"2024-01-0{1 + n}"),
    "numpy text": lambda n: [np.str_(""), np.bytes_(b""), np.str_(f"é{n}\0"), np.bytes_(b"a\0")],
    "numpy dtype": lambda n: np.dtype(f"int{8 << n}"),
    "numpy dtypes of other forms": lambda n: [
        np.dtype(c) for c in (">f4", f">i{4 << n}", "U", "S")
    ],
    "torch.Size": lambda n: torch.Size([2, n]),
    "torch.dtype": lambda n: (torch.float16, torch.bfloat16)[n],
    "torch.device": lambda n: torch.device(("meta", "cpu")[n]),
    "memory_format": lambda n: torch.channels_last,
    "layout": lambda n: torch.strided,
    "qscheme": lambda n: torch.per_tensor_affine,
    "OrderedDict": lambda n: collections.OrderedDict(b=n, a=2),
    "defaultdict": lambda n: collections.defaultdict(list, a=[n]),
    "ChainMap": lambda n: collections.ChainMap({"a": n}, {"b": 2}),
    "UserDict": lambda n: collections.UserDict(a=n),
    "dict with keys of all kinds": lambda n: {1: n, (2, "a"): n, None: n, b"x": n, 1.5: n},
    "tuple of tensors": lambda n: (torch.full((2,), float(n)), n),
    "dict of empty containers": lambda n: {"a": {}, "b": [], "c": (), "n": n},
    "BytesIO": lambda n: io.BytesIO(bytes([n])),
    "StringIO": lambda n: io.StringIO(f"a\r\n{n}"),
    "array of text": lambda n: np.array([["a", f"bc{n}"]]),
    "array of bytes": lambda n: np.array([b"a", bytes([97, 98 + n])]),
    "array of times": lambda n: np.array([f"2024-01-0{1 + n}"], dtype="datetime64[D]"),
    "array, big-endian": lambda n: np.arange(6, dtype=">f4").reshape(2, 3) + np.float32(n),
    "array, reversed": lambda n: (np.arange(6.0) + n)[::-1],
    "array, complex128": lambda n: np.array([n + 2j]),
    "array without dimensions": lambda n: np.array(2.5 + n),
    "array, float16": lambda n: np.array([n], dtype=np.float16),
}
for _name, _make in _VALUES.items():
    row(_name)(_make)


@row("mappingproxy", whole=lambda n: {"a": n})
def _(n: int) -> Any:
    return types.MappingProxyType({"a": n})


def _read_only(n: int) -> Any:
    array = np.arange(3.0) + n
    array.flags.writeable = False
    return array


row("array, read-only")(_read_only)
row("memoryview with steps", whole=lambda n: bytes([n, 3]))(
    lambda n: memoryview(bytes([n, 2, 3]))[::2]
)
row("memoryview", whole=lambda n: bytes([n]))(lambda n: memoryview(bytes([n])))
row("namedtuple", whole=lambda n: (n, "x"))(lambda n: Pair(n, "x"))
row("namedtuple of tensors", whole=lambda n: (torch.ones(2) * n, "x"))(
    lambda n: Pair(torch.ones(2) * n, "x")
)
row("dataclass", whole=lambda n: types.SimpleNamespace(epoch=n, seen=[1, (2,)]))(
    lambda n: Progress(n, [1, (2,)])
)
row(
    "dataclass of a tensor", whole=lambda n: types.SimpleNamespace(epoch=4, seen=torch.ones(2) * n)
)(lambda n: Progress(4, torch.ones(2) * n))
row("frozen dataclass", whole=lambda n: types.SimpleNamespace(lr=float(n), betas=(0.9, 0.99)))(
    lambda n: Frozen(float(n))
)
row("SimpleNamespace")(lambda n: types.SimpleNamespace(a=n, b={"c": 2}))
row("argparse.Namespace", whole=lambda n: types.SimpleNamespace(lr=0.1, n=n))(
    lambda n: argparse.Namespace(lr=0.1, n=n)
)
row("Generator", whole=lambda n: torch.Generator().manual_seed(n).get_state())(
    lambda n: torch.Generator().manual_seed(n)
)


class Opaque:
    """An object of which nothing is known."""


row("object", refused=True, replaced=True)(lambda n: Opaque())
row("function", refused=True, replaced=True)(lambda n: len)
row("lambda", refused=True, replaced=True)(lambda n: lambda: n)
row("array of objects", refused=True, replaced=True)(lambda n: np.array([Opaque()], dtype=object))
row("masked array", refused=True)(lambda n: np.ma.masked_array([1.0, 2.0], [True, False]))
row("structured array", refused=True, replaced=True)(
    lambda n: np.zeros(2, dtype=[("a", "i4"), ("b", "f4")])
)
row("path of Windows", refused=True, replaced=True)(lambda n: pathlib.PureWindowsPath("a/b"))
row("int of 4,001 digits", refused=True, replaced=True)(lambda n: -(10**4000))
row("array of variable text", refused=True, replaced=True)(
    lambda n: np.array(["a"], dtype=np.dtypes.StringDType())
)
row("dtype of variable text", refused=True, replaced=True)(lambda n: np.dtypes.StringDType())
row("lock", refused=True, replaced=True)(lambda n: __import__("threading").Lock())
row("iterator", refused=True, replaced=True)(lambda n: iter([1]))
