"""Typed JSON: the values of a state, encoded as JSON with tags.

None, bool, str, finite floats, ints of up to 53 bits, lists, and dicts whose keys are all strings
without a leading "$" are plain JSON. Every other value is an object with one key, its tag, which
begins with "$". `FORMS` and `TORCH_TAGS` list the tags, and docs/format.md describes them.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import math
import operator
import pathlib
import re
import struct
import sys
import types
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from shardckpt.errors import (
    CheckpointError,
    CorruptionError,
    FormatVersionError,
    UnsupportedLeafError,
)

__all__ = [
    "FORMS",
    "TORCH_TAGS",
    "Record",
    "TensorRef",
    "UnknownEnum",
    "decode",
    "encode",
    "imported",
    "mapping",
    "record_of",
    "reference",
    "tag_of",
    "torch_forms",
    "unknown_enum",
]

_NESTED = {dict, list}
_SAFE_INT = 1 << 53  # readers of JSON that use doubles round larger ints
_MOST_DIGITS = 4000  # the time to read an int grows with the square of its digits
_MOST_BITS = 13287  # the largest number of bits that never needs more digits
_NUMPY_DTYPE = re.compile(r"[<>|][biufcSUMm]\d{1,9}(\[\d{0,9}[A-Za-z]+\])?")
_ARRAY_BYTES = 1 << 20
"""The largest array, in bytes, that is stored in the manifest if its dtype is not a dtype of
tensors."""
_MOST_EQUAL_HASHES = 256
"""The maximum number of keys of a dict, or items of a set, with the same hash. (Tuples of -1 and -2
have equal hashes.)"""
_REFS = {"tensor": "$tensor", "numpy": "$ndarray", "per_rank": "$per_rank"}
_REF_TYPES: dict[str, Any] = {tag: ref_type for ref_type, tag in _REFS.items()}


class TensorRef(msgspec.Struct, frozen=True, gc=False):
    """A reference to a tensor, an array or a PerRank value.

    `name` is the name of the tensor. For "per_rank" it is the index into the list of values of each
    rank.
    """

    name: str
    ref_type: Literal["tensor", "numpy", "per_rank"]


class Record(dict[str, Any]):
    """The fields of a dataclass or a similar object. `type_name` is the name of its class.

    The class is never looked up. The object is loaded as types.SimpleNamespace, or, if the state
    holds an object to load into, as one of the class of that object.
    """

    def __init__(self, type_name: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.type_name = type_name


class UnknownEnum(msgspec.Struct, frozen=True):
    """A saved member of an enum whose module is not imported, or that lacks the member."""

    module: str
    qualname: str
    name: str | int


def unknown_enum(value: UnknownEnum, *, name: str | None = None) -> CheckpointError:
    """Return the error for an entry with an unknown enum."""
    return CheckpointError(
        "An entry is a member of an enum that the program does not have",
        tensor=name,
        expected=f"{value.qualname} with the member {value.name} in the module {value.module}",
        actual="no such member in the imported modules",
        remedy=f"import {value.module} first, or leave the entry out with keys=",
    )


def _refuse_unknown(value: UnknownEnum) -> Any:
    raise unknown_enum(value)


def record_of(value: Any) -> Record | None:
    """Return the fields of a dataclass, an attrs object, a SimpleNamespace or an
    argparse.Namespace.

    Returns None for other objects.
    """
    cls = type(value)
    if isinstance(value, Record):
        return value
    if isinstance(value, Mapping):  # saved by its items, as ModelOutput of transformers is
        return None
    if cls.__module__.partition(".")[0] == "shardckpt" or isinstance(value, type):
        return None  # a marker inside another value has no meaning
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
    elif hasattr(cls, "__attrs_attrs__"):
        names = [field.name for field in cls.__attrs_attrs__]
    elif isinstance(value, types.SimpleNamespace) or cls is imported("argparse", "Namespace"):
        names = list(vars(value))
    else:
        return None
    fields = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return Record(f"{cls.__module__}.{cls.__qualname__}", fields)


def encode(value: Any, *, at: str) -> Any:
    """Encode a value as JSON. Raises UnsupportedLeafError with the path of the value."""
    if value is None or value is True or value is False:
        return value
    cls = type(value)
    if cls is str or cls is int or cls is float:
        return _scalar(value, at)
    if cls is list:
        return _items(value, at)
    if cls is dict:
        items = [(key, encode(item, at=_below(at, key))) for key, item in value.items()]
        return mapping(items, at=at)
    form = _BY_TYPE.get(cls) or _form_of(cls)  # type: ignore[arg-type]  # mypy takes no class for hashable
    if form is not None:
        return {form.tag: form.encode(value, at)}
    if isinstance(value, (str, int, float)):
        return _scalar(value, at)
    if isinstance(value, list):
        return _items(value, at)
    if isinstance(value, Mapping) and not isinstance(value, Record):
        return encode(dict(value.items()), at=at)
    if isinstance(value, TensorRef):
        return reference(value.ref_type, value.name)
    record = record_of(value)
    if record is not None:
        return {"$record": [record.type_name, encode(dict(record), at=at)]}
    raise _unsupported(value, at)


def _unsupported(value: Any, at: str) -> UnsupportedLeafError:
    cls = type(value)
    return UnsupportedLeafError(
        "The type of a value can't be saved",
        tensor=at or "(the state itself)",
        expected="a tensor, array, number, string, bytes, date, enum, dataclass, container of "
        "these, or an object with state_dict and load_state_dict",
        actual=f"{cls.__module__}.{cls.__qualname__}",
        remedy="remove it, convert it, or give its class state_dict and load_state_dict",
    )


def _below(at: str, key: Any) -> str:
    return f"{at}.{key}" if at else str(key)


def _items(value: Any, at: str) -> list[Any]:
    return [encode(item, at=_below(at, i)) for i, item in enumerate(value)]


def _scalar(value: str | int | float, at: str) -> Any:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return {"$str": value.encode("utf-8", "surrogatepass").hex()}
        return str(value)
    if isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise UnsupportedLeafError(
                "An int is too long to be saved",
                tensor=at,
                expected=f"at most {_MOST_BITS} bits",
                actual=f"{value.bit_length()} bits",
                remedy="save it as bytes: value.to_bytes(...)",
            )
        return int(value) if -_SAFE_INT <= value <= _SAFE_INT else {"$int": str(int(value))}
    if math.isfinite(value):
        return float(value)
    return {"$float": struct.pack(">d", value).hex()}


def reference(ref_type: Literal["tensor", "numpy", "per_rank"], name: str) -> Any:
    """Encode a reference to a tensor, an array or a PerRank value; see TensorRef."""
    return {_REFS[ref_type]: name}


def mapping(items: list[tuple[Any, Any]], *, at: str) -> Any:
    """Encode a dict, given its keys and encoded values."""
    if all(type(k) is str and k[:1] != "$" and (k.isascii() or _plain(k)) for k, _ in items):
        return dict(items)
    return {"$dict": [[_hashable(key, _below(at, key)), item] for key, item in items]}


def _plain(key: str) -> bool:
    return isinstance(_scalar(key, ""), str)


def _hashable(value: Any, at: str) -> Any:
    """Encode a key of a dict or an item of a set. Records are refused, as they are not hashable
    when loaded."""
    node = encode(value, at=at)
    if type(node) is dict and b'{"$record":' in msgspec.json.encode(node):
        raise _unsupported(value, at)
    return node


def tag_of(node: dict[str, Any]) -> str | None:
    """Return the tag of an object of typed JSON. None for a dict with plain keys."""
    tag = next(iter(node), "") if len(node) == 1 else ""
    return tag if tag[:1] == "$" else None


def decode(
    node: Any,
    *,
    tensor: Callable[[TensorRef], Any],
    record: Callable[[str, dict[str, Any]], Any] = Record,
    unknown: Callable[[UnknownEnum], Any] = _refuse_unknown,
) -> Any:
    """Decode the JSON that `encode` wrote.

    `tensor` is called with each reference, `record` with the fields of each object, and `unknown`
    with each member of an enum whose module is not imported; they return the value. Nothing is
    imported.

    Raises CorruptionError for invalid JSON, FormatVersionError for an unknown tag, and by default
    CheckpointError for an unknown enum.
    """

    def item(node: Any) -> Any:
        cls = type(node)
        if cls is dict:
            if len(node) == 1:
                ((tag, body),) = node.items()
                if tag[:1] == "$":
                    try:
                        return tagged(tag, body)
                    except CheckpointError:
                        raise
                    except _INVALID as error:
                        raise _malformed(node) from error
            found = {}
            for key, inner in node.items():
                if key[:1] == "$":
                    raise _malformed(node)
                if type(inner) is dict and len(inner) == 1 and type(inner.get("$tensor")) is str:
                    found[key] = tensor(TensorRef(inner["$tensor"], "tensor"))  # as most items
                else:
                    found[key] = item(inner) if type(inner) in _NESTED else inner
            return found
        return [item(inner) for inner in node] if cls is list else node

    def tagged(tag: str, body: Any) -> Any:
        decoder = _DECODERS.get(tag)
        if tag in TORCH_TAGS:
            decoder = torch_forms()[tag].decode
        if decoder is not None:
            value = decoder(body, item)
            return unknown(value) if type(value) is UnknownEnum else value
        if tag in _REF_TYPES:
            return tensor(TensorRef(_checked(body, str), _REF_TYPES[tag]))
        if tag == "$record":
            type_name, fields = _checked(body, list)
            return record(_checked(type_name, str), _checked(item(fields), dict))
        raise FormatVersionError(
            "The checkpoint has a value in a form that this version of shardckpt does not support",
            expected="a tag that docs/format.md lists",
            actual=repr(tag[:80]),
            remedy="upgrade shardckpt: a newer version wrote the checkpoint",
        )

    try:
        return item(node)
    finally:
        # They refer to each other, and so to the tensors.
        item = tagged = None  # type: ignore[assignment]


_INVALID = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, struct.error)


def _malformed(node: Any) -> CorruptionError:
    return CorruptionError(
        "A value in the manifest violates the format",
        expected="a value as docs/format.md describes it",
        actual=repr(node)[:200],
        remedy="load another checkpoint",
    )


class Form(NamedTuple):
    """How values of a type are encoded: {tag: body}.

    `encode(value, at)` returns the body, `decode(body, item)` the value; `item` decodes the values
    in the body. If `exact` is true, subclasses are refused, as the form would lose their other
    fields.
    """

    tag: str
    type: Any
    encode: Callable[[Any, str], Any]
    decode: Callable[[Any, Callable[[Any], Any]], Any]
    exact: bool = False


def _checked(body: Any, cls: type[Any]) -> Any:
    if type(body) is not cls:
        raise TypeError(f"{cls.__name__} expected")
    return body


def _sequence(make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda body, item: make(map(item, _checked(body, list)))


def _of_hashes(make: Callable[[list[Any]], Any]) -> Callable[[Any, Any], Any]:
    return lambda body, item: make(_keys([item(key) for key in _checked(body, list)]))


def _keys(keys: list[Any]) -> list[Any]:
    """Return the keys. Raises ValueError if so many have the same hash that lookups would be
    slow.
    """
    if len(keys) > _MOST_EQUAL_HASHES:
        most = max(Counter(map(hash, keys)).values())
        if most > _MOST_EQUAL_HASHES:
            raise ValueError(f"more than {_MOST_EQUAL_HASHES} keys with the same hash")
    return keys


def _text(make: Callable[[str], Any]) -> Callable[[Any, Any], Any]:
    return lambda body, item: make(_checked(body, str))


def _ints(make: Callable[..., Any], count: int) -> Callable[[Any, Any], Any]:
    def decoder(body: Any, item: Any) -> Any:
        parts = [item(part) for part in _checked(body, list)]
        if not all(type(part) is int or (part is None and make is slice) for part in parts):
            raise TypeError("ints expected")
        if len(parts) != count:
            raise ValueError(f"{count} ints expected")
        return make(*parts)

    return decoder


def _base64(raw: Any, at: str = "") -> str:
    return base64.b64encode(raw).decode()


def _unbase64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _integer(text: str) -> int:
    if len(text.removeprefix("-")) > _MOST_DIGITS:
        raise ValueError("expected an int of up to 4,000 digits")
    return int(text)


def _set_body(value: Any, at: str) -> Any:
    return sorted((_hashable(item, at) for item in value), key=msgspec.json.encode)


def _pairs(body: Any, item: Any) -> Any:
    pairs = [(item(key), item(value)) for key, value in _checked(body, list)]
    _keys([key for key, _ in pairs])
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _deque(body: Any, item: Any) -> Any:
    limit, items = _checked(body, list)
    if limit is not None:
        _checked(limit, int)
    return collections.deque(map(item, _checked(items, list)), limit)


def imported(module: str, qualname: str) -> Any:
    """Return the object with a name in an imported module, or None.

    Only the dictionaries of modules and classes are searched, so that no `__getattr__` of a module,
    no lazy module and no descriptor runs.
    """
    found: Any = sys.modules.get(module)
    if not isinstance(found, types.ModuleType):
        return None
    names = object.__getattribute__(found, "__dict__")
    for part in qualname.split("."):
        found = names.get(part)
        names = type.__getattribute__(found, "__dict__") if issubclass(type(found), type) else {}
    return found


def _enum_body(value: enum.Enum, at: str) -> Any:
    """Raise UnsupportedLeafError for an enum that a load could not find by its name, such as one
    defined in a function."""
    cls = type(value)
    if imported(cls.__module__, cls.__qualname__) is not cls:
        raise _unsupported(value, at)
    single = cls.__members__.get(value.name or "") is value  # false for a combination of flags
    return [cls.__module__, cls.__qualname__, value.name if single else value.value]


def _enum(body: Any, item: Any) -> Any:
    module, qualname, name = _checked(body, list)
    found = imported(_checked(module, str), _checked(qualname, str))
    is_enum = issubclass(type(found), type) and issubclass(found, enum.Enum)
    if type(name) is int and is_enum and issubclass(found, enum.Flag):
        return found(name)
    if is_enum and name in found.__members__:
        return found[name]
    return UnknownEnum(module, qualname, name if type(name) is int else _checked(name, str))


def _numpy_dtype(code: str) -> np.dtype[Any]:
    if not _NUMPY_DTYPE.fullmatch(code):  # numpy would parse other texts as Python
        raise ValueError("a dtype of numbers, text or time")
    dtype = np.dtype(code)
    if dtype.hasobject or dtype.kind == "V":
        raise ValueError("a dtype of objects")
    return dtype


def _numpy_dtype_body(value: np.dtype[Any], at: str) -> Any:
    if not _NUMPY_DTYPE.fullmatch(value.str):
        raise _unsupported(value, at)
    return value.str


def _numpy_body(value: Any, at: str) -> Any:
    if not _NUMPY_DTYPE.fullmatch(value.dtype.str):
        raise _unsupported(value, at)
    little = value.dtype.newbyteorder("<")
    return [little.str, _base64(np.asarray(value).astype(little).tobytes())]


def _numpy(body: Any, item: Any) -> Any:
    code, raw = _checked(body, list)
    dtype, data = _numpy_dtype(_checked(code, str)), _unbase64(_checked(raw, str))
    if dtype.kind in "SU":  # as an element of an array it would lose the zeros at its end
        text = data[: dtype.itemsize]
        return np.bytes_(text) if dtype.kind == "S" else np.str_(text.decode("utf-32-le"))
    (value,) = np.frombuffer(data, dtype=dtype)
    return value


def _array_body(value: Any, at: str) -> Any:
    fits = _NUMPY_DTYPE.fullmatch(value.dtype.str) and value.itemsize
    # The size of long doubles depends on the machine.
    fits = fits and value.dtype not in (np.longdouble, np.clongdouble)
    if not fits or isinstance(value, np.ma.MaskedArray) or value.nbytes > _ARRAY_BYTES:
        raise UnsupportedLeafError(
            "A numpy array of this dtype can't be saved",
            tensor=at,
            expected="numbers of up to 64 bits, of any size; or text, bytes, times and longer "
            f"numbers of up to {_ARRAY_BYTES} bytes in all",
            actual=f"{type(value).__name__} of {value.dtype}, {value.nbytes} bytes",
            remedy="convert it with astype(), or save it as a list",
        )
    code, raw = _numpy_body(value, at)
    return [code, list(value.shape), raw]


def _array(body: Any, item: Any) -> Any:
    code, shape, raw = _checked(body, list)
    dtype = _numpy_dtype(_checked(code, str))
    if not all(type(size) is int and size >= 0 for size in _checked(shape, list)):
        raise ValueError("sizes expected")
    return np.frombuffer(_unbase64(_checked(raw, str)), dtype=dtype).reshape(shape).copy()


def _complex(body: Any, item: Any) -> complex:
    real, imag = (_checked(item(part), float) for part in _checked(body, list))
    return complex(real, imag)


def _moment_body(value: datetime.datetime | datetime.time, at: str) -> Any:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise _unsupported(value, at)  # the offset of its time zone depends on the day
    return [value.isoformat(), value.fold]


def _moment(cls: Any) -> Callable[[Any, Any], Any]:
    def decoder(body: Any, item: Any) -> Any:
        text, fold = _checked(body, list)
        return cls.fromisoformat(_checked(text, str)).replace(fold=_checked(fold, int))

    return decoder


def _slice_body(value: Any, at: str) -> Any:
    parts = (value.start, value.stop, value.step)
    try:
        return [part if part is None else _scalar(operator.index(part), at) for part in parts]
    except TypeError:
        raise _unsupported(value, at) from None


def _path_body(value: pathlib.PurePath, at: str) -> Any:
    if isinstance(value, pathlib.PureWindowsPath):
        raise _unsupported(value, at)  # it would be loaded as another path
    return _scalar(str(value), at)


FORMS: tuple[Form, ...] = (
    # The bases of an enum may be int or str, so this form comes first.
    Form("$enum", enum.Enum, _enum_body, _enum),
    Form("$numpy", np.generic, _numpy_body, _numpy),
    Form("$tuple", tuple, _items, _sequence(tuple)),
    Form("$set", set, _set_body, _of_hashes(set)),
    Form("$frozenset", frozenset, _set_body, _of_hashes(frozenset)),
    Form(
        "$deque",
        collections.deque,
        lambda value, at: [value.maxlen, _items(value, at)],
        _deque,
    ),
    Form(
        "$counter",
        Counter,
        lambda value, at: [[_hashable(k, at), encode(n, at=at)] for k, n in value.items()],
        lambda body, item: Counter(_pairs(body, item)),
    ),
    Form(
        "$complex",
        complex,
        lambda value, at: [_scalar(value.real, at), _scalar(value.imag, at)],
        _complex,
    ),
    Form("$bytes", bytes, _base64, _text(_unbase64)),
    Form("$bytes", memoryview, lambda value, at: _base64(value.tobytes()), _text(_unbase64)),
    Form("$bytearray", bytearray, _base64, _text(lambda text: bytearray(_unbase64(text)))),
    Form(
        "$bytesio",
        io.BytesIO,
        lambda value, at: _base64(value.getvalue()),
        _text(lambda text: io.BytesIO(_unbase64(text))),
    ),
    Form(
        "$stringio",
        io.StringIO,
        lambda value, at: _scalar(value.getvalue(), at),
        lambda body, item: io.StringIO(_checked(item(body), str), newline=""),
    ),
    Form("$slice", slice, _slice_body, _ints(slice, 3)),
    Form("$range", range, _slice_body, _ints(range, 3)),
    Form(
        "$path",
        pathlib.PurePath,
        _path_body,
        lambda body, item: pathlib.Path(_checked(item(body), str)),
    ),
    Form("$datetime", datetime.datetime, _moment_body, _moment(datetime.datetime), exact=True),
    Form(
        "$date",
        datetime.date,
        lambda value, at: value.isoformat(),
        _text(datetime.date.fromisoformat),
        exact=True,
    ),
    Form("$time", datetime.time, _moment_body, _moment(datetime.time), exact=True),
    Form(
        "$timedelta",
        datetime.timedelta,
        lambda value, at: [value.days, value.seconds, value.microseconds],
        _ints(datetime.timedelta, 3),
        exact=True,
    ),
    Form("$decimal", decimal.Decimal, lambda value, at: str(value), _text(decimal.Decimal)),
    Form(
        "$fraction",
        fractions.Fraction,
        lambda value, at: [_scalar(value.numerator, at), _scalar(value.denominator, at)],
        _ints(fractions.Fraction, 2),
    ),
    Form("$uuid", uuid.UUID, lambda value, at: value.hex, _text(uuid.UUID)),
    Form("$ellipsis", type(Ellipsis), lambda value, at: None, lambda body, item: Ellipsis),
    Form("$array", np.ndarray, _array_body, _array),
    Form(
        "$numpy_dtype",
        np.dtype,
        _numpy_dtype_body,
        _text(_numpy_dtype),
    ),
)
"""The types of Python and numpy with a form. A value of two of these types has the form of the
first one."""

TORCH_TAGS = ("$size", "$dtype", "$memory_format", "$layout", "$qscheme", "$device")
"""The tags of the types of torch."""


@functools.cache
def torch_forms() -> dict[str, Form]:
    """Return the forms of the types of torch by their tags. Imports torch."""
    import torch

    from shardckpt.format.dtypes import torch_dtype

    def size(parts: Any) -> torch.Size:
        return torch.Size([_checked(part, int) for part in parts])

    def constant(cls: type) -> Callable[[str], Any]:
        def found(name: str) -> Any:
            # getattr is not used, as torch imports modules on demand.
            if not isinstance(value := vars(torch)[name], cls):
                raise TypeError(f"a {cls} expected")
            return value

        return found

    def device(name: str) -> torch.device:
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"no device: {name}") from error

    def name(value: Any, at: str) -> str:
        return str(value).removeprefix("torch.")

    named = {"$dtype": (torch.dtype, torch_dtype), "$device": (torch.device, device)}
    for cls in (torch.memory_format, torch.layout, torch.qscheme):
        named[f"${cls.__name__}"] = (cls, constant(cls))
    forms = {tag: Form(tag, cls, name, _text(make)) for tag, (cls, make) in named.items()}
    return {
        "$size": Form("$size", torch.Size, lambda value, at: list(value), _sequence(size)),
        **forms,
    }


_BY_TYPE: dict[type, Form] = {}
for _form in FORMS:
    _BY_TYPE.setdefault(_form.type, _form)


@functools.lru_cache(maxsize=256)
def _form_of(cls: type) -> Form | None:
    """Return the form of values whose type has no form of its own in `FORMS`."""
    torch = torch_forms().values() if "torch" in sys.modules else ()
    base = next((form for form in (*torch, *FORMS) if issubclass(cls, form.type)), None)
    return None if base is None or base.exact else base


_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    **{form.tag: form.decode for form in FORMS},
    # Values of plain types that JSON lacks: see _scalar and mapping.
    "$dict": _pairs,
    "$int": _text(_integer),
    "$float": _text(lambda text: struct.unpack(">d", bytes.fromhex(text))[0]),
    "$str": _text(lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass")),
}
