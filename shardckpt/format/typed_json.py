"""The typed JSON of everything that is no tensor.

None, bool, str, finite floats and lists stand as in JSON, and so do ints of up to 53 bits and
dicts whose keys are all strings that don't begin with "$". Whatever else is an object with one
key that begins with "$": docs/format.md lists them.
"""

from __future__ import annotations

import base64
import collections
import enum
import math
import pathlib
import re
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from shardckpt.errors import CheckpointError, CorruptionError, UnsupportedLeafError

__all__ = ["TensorRef", "decode", "encode", "mapping", "reference"]

_NESTED = {dict, list}
_SAFE_INT = 1 << 53  # beyond it, readers of JSON that have only doubles round
_NUMPY_DTYPE = re.compile(r"[<|][biufcSUMm]\d{1,9}(\[\d{0,9}[A-Za-z]+\])?")
_REFS = {"tensor": "$tensor", "numpy": "$ndarray", "per_rank": "$per_rank"}


class TensorRef(msgspec.Struct, frozen=True):
    """Stands where a tensor, an array or a value per rank stood; `name` says which.

    For "per_rank" the name is the index into each rank's list of values.
    """

    name: str
    kind: Literal["tensor", "numpy", "per_rank"]


def encode(value: Any, *, at: str) -> Any:
    """The JSON-able form of a value; raises UnsupportedLeafError naming the path below `at`."""
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    if kind is str or kind is int or kind is float:
        return _scalar(value)
    if kind is list:
        return [encode(item, at=_below(at, i)) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and not isinstance(value, collections.Counter):
        items = [(key, encode(item, at=_below(at, key))) for key, item in value.items()]
        return mapping(items, at=at)
    if isinstance(value, TensorRef):
        return reference(value.kind, value.name)
    node = _tagged(value, at)
    if node is None:
        raise UnsupportedLeafError(
            "A value of this type can't be saved",
            tensor=at or "(the state itself)",
            expected="a tensor, array, number, string, bytes, enum, container of these, or an "
            "object with state_dict and load_state_dict",
            actual=f"{kind.__module__}.{kind.__qualname__}",
            remedy="leave it out, convert it, or give its class state_dict and load_state_dict",
        )
    return node


def _below(at: str, key: Any) -> str:
    return f"{at}.{key}" if at else str(key)


def _scalar(value: str | int | float) -> Any:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return {"$str": value.encode("utf-8", "surrogatepass").hex()}
        return str(value)
    if isinstance(value, int):
        return int(value) if -_SAFE_INT <= value <= _SAFE_INT else {"$int": str(int(value))}
    if math.isfinite(value):
        return float(value)
    return {"$float": struct.pack(">d", value).hex()}


def reference(kind: Literal["tensor", "numpy", "per_rank"], name: str) -> Any:
    """What stands for a tensor, an array or a value per rank; see TensorRef."""
    return {_REFS[kind]: name}


def mapping(items: list[tuple[Any, Any]], *, at: str) -> Any:
    """The JSON-able form of a dict with these keys and encoded values."""
    if all(type(k) is str and k[:1] != "$" and (k.isascii() or _plain(k)) for k, _ in items):
        return dict(items)
    return {"$dict": [[encode(key, at=_below(at, key)), item] for key, item in items]}


def _plain(key: str) -> bool:
    return isinstance(_scalar(key), str)


def _tagged(value: Any, at: str) -> Any:
    """The object with a "$" key for a value of a type that JSON lacks; None for one unknown."""
    if isinstance(value, enum.Enum):
        return _enum_node(value)
    if isinstance(value, np.generic):
        if value.dtype.hasobject or value.dtype.kind == "V":
            return None
        little = value.dtype.newbyteorder("<")
        raw = np.asarray(value).astype(little).tobytes()
        return {"$numpy": [little.str, _base64(raw)]}
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, (str, int, float)):
        return _scalar(value)
    if isinstance(value, complex):
        return {"$complex": [_scalar(value.real), _scalar(value.imag)]}
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if isinstance(value, (tuple, list)):
        items = [encode(item, at=_below(at, i)) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, collections.deque):
        return {"$deque": [value.maxlen, [encode(item, at=at) for item in value]]}
    if isinstance(value, collections.Counter):
        return {"$counter": [[encode(k, at=at), encode(n, at=at)] for k, n in value.items()]}
    if isinstance(value, (set, frozenset)):
        tag = "$set" if isinstance(value, set) else "$frozenset"
        return {tag: sorted((encode(item, at=at) for item in value), key=msgspec.json.encode)}
    if isinstance(value, (bytes, bytearray)):
        tag = "$bytes" if isinstance(value, bytes) else "$bytearray"
        return {tag: _base64(bytes(value))}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if isinstance(value, slice):
        return {"$slice": [encode(part, at=at) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, range):
        return {"$range": [_scalar(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, pathlib.PurePath):
        return {"$path": _scalar(str(value))}
    return None


def _enum_node(value: enum.Enum) -> Any:
    """None for an enum that could not be found again by its name, as one made in a function."""
    kind = type(value)
    if _class_at(kind.__module__, kind.__qualname__) is not kind:
        return None
    single = kind.__members__.get(value.name or "") is value  # a combination of flags is none
    return {"$enum": [kind.__module__, kind.__qualname__, value.name if single else value.value]}


def _class_at(module: str, qualname: str) -> Any:
    """What is at this name in a module that has been imported; None if nothing is."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def decode(node: Any, *, tensor: Callable[[TensorRef], Any]) -> Any:
    """The value that `encode` made this of; `tensor` is asked for what a reference stands for.

    Raises CorruptionError for a node that encode never makes, and CheckpointError for an enum
    whose module has not been imported: nothing is imported for the sake of a checkpoint.
    """

    def item(node: Any) -> Any:
        kind = type(node)
        if kind is dict:
            if len(node) == 1:
                ((tag, body),) = node.items()
                if tag == "$tensor" and type(body) is str:  # as most are
                    return tensor(TensorRef(body, "tensor"))
                if tag[:1] == "$":
                    try:
                        return _DECODERS[tag](body, item, tensor)
                    except CheckpointError:
                        raise
                    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as e:
                        raise _malformed(node) from e
            found = {}
            for key, inner in node.items():
                if key[:1] == "$":
                    raise _malformed(node)
                found[key] = item(inner) if type(inner) in _NESTED else inner
            return found
        return [item(inner) for inner in node] if kind is list else node

    return item(node)


def _malformed(node: Any) -> CorruptionError:
    return CorruptionError(
        "A value in the manifest breaks the rules of the format",
        expected="a value as docs/format.md describes it",
        actual=repr(node)[:200],
        remedy="load another checkpoint",
    )


_Decoder = Callable[[Any, Callable[[Any], Any], Callable[[TensorRef], Any]], Any]


def _checked(body: Any, kind: type[Any]) -> Any:
    if type(body) is not kind:
        raise TypeError(f"{kind.__name__} expected")
    return body


def _ref(kind: Literal["tensor", "numpy", "per_rank"]) -> _Decoder:
    return lambda body, item, tensor: tensor(TensorRef(_checked(body, str), kind))


def _sequence(make: Callable[[Any], Any]) -> _Decoder:
    return lambda body, item, tensor: make(item(part) for part in _checked(body, list))


def _text(make: Callable[[str], Any]) -> _Decoder:
    return lambda body, item, tensor: make(_checked(body, str))


def _unbase64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _integer(text: str) -> int:
    if len(text) > 4000:
        raise ValueError("an int of more than 4,000 digits")
    return int(text)


def _enum(body: Any, item: Any, tensor: Any) -> Any:
    module, qualname, name = _checked(body, list)
    found = _class_at(_checked(module, str), _checked(qualname, str))
    if not (isinstance(found, type) and issubclass(found, enum.Enum)):
        raise CheckpointError(
            "An enum was saved whose class is not there",
            expected=f"the enum {qualname} in the module {module}",
            actual="no such class among the imported modules",
            remedy=f"import {module} first, or leave this entry out with keys=",
        )
    if type(name) is int and issubclass(found, enum.Flag):
        return found(name)
    return found[_checked(name, str)]


def _dict(body: Any, item: Any, tensor: Any) -> Any:
    pairs = [(item(key), item(value)) for key, value in _checked(body, list)]
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _deque(body: Any, item: Any, tensor: Any) -> Any:
    limit, items = _checked(body, list)
    if limit is not None:
        _checked(limit, int)
    return collections.deque((item(part) for part in _checked(items, list)), limit)


def _numpy(body: Any, item: Any, tensor: Any) -> Any:
    code, raw = _checked(body, list)
    if not _NUMPY_DTYPE.fullmatch(_checked(code, str)):  # numpy would parse it as Python
        raise ValueError("a dtype of numbers, text or time")
    dtype = np.dtype(code)
    if dtype.hasobject or dtype.kind == "V":
        raise ValueError("a dtype of objects")
    (value,) = np.frombuffer(_unbase64(_checked(raw, str)), dtype=dtype)
    return value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError("a torch dtype expected")
    return found


def _ints(make: Callable[..., Any], *, spread: bool) -> _Decoder:
    def decoder(body: Any, item: Any, tensor: Any) -> Any:
        parts = [item(part) for part in _checked(body, list)]
        if not all(type(part) is int or (part is None and make is slice) for part in parts):
            raise TypeError("ints expected")
        if spread and len(parts) != 3:
            raise ValueError("start, stop and step expected")
        return make(*parts) if spread else make(parts)

    return decoder


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device: {name}") from error


def _complex(body: Any, item: Any, tensor: Any) -> complex:
    real, imag = (_checked(item(part), float) for part in _checked(body, list))
    return complex(real, imag)


_DECODERS: dict[str, _Decoder] = {
    "$tensor": _ref("tensor"),
    "$ndarray": _ref("numpy"),
    "$per_rank": _ref("per_rank"),
    "$tuple": _sequence(tuple),
    "$set": _sequence(set),
    "$frozenset": _sequence(frozenset),
    "$dict": _dict,
    "$int": _text(_integer),
    "$float": _text(lambda text: struct.unpack(">d", bytes.fromhex(text))[0]),
    "$str": _text(lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass")),
    "$complex": _complex,
    "$bytes": _text(_unbase64),
    "$bytearray": _text(lambda text: bytearray(_unbase64(text))),
    "$dtype": _text(_dtype),
    "$device": _text(_device),
    "$size": _ints(torch.Size, spread=False),
    "$slice": _ints(slice, spread=True),
    "$range": _ints(range, spread=True),
    "$path": lambda body, item, tensor: pathlib.Path(_checked(item(body), str)),
    "$counter": lambda body, item, tensor: collections.Counter(_dict(body, item, tensor)),
    "$deque": _deque,
    "$enum": _enum,
    "$numpy": _numpy,
}
