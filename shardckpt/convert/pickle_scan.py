"""Check pickles before they are loaded, and read their structure without importing their classes.

An unpickler in C allocates memory by numbers in the pickle: an index into its memo, the length of a
string. `scan` first checks the opcodes, and refuses those that a saved state does not need.
`PickleStructure` then reads the structure: a stand-in replaces every class and function, so that
nothing that a pickle names is imported, called or changed.
"""

from __future__ import annotations

import io
import mmap
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["Named", "PickleStructure", "Readable", "scan"]

Readable = bytes | memoryview | mmap.mmap

_FIXED = {  # opcode -> bytes that follow it; of the opcodes with text only GLOBAL is accepted
    **dict.fromkeys(b"(.012N)]}tabuseRQlod", 0),
    **dict.fromkeys(b"\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94", 0),
    **dict.fromkeys(b"Kh\x80", 1),
    **dict.fromkeys(b"M", 2),
    **dict.fromkeys(b"Jj", 4),
    **dict.fromkeys(b"G\x95", 8),
}
_COUNTED = {  # opcode -> bytes of the length that follows it, before the data
    **dict.fromkeys(b"U\x8a\x8cC", 1),
    **dict.fromkeys(b"XTB", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
_PUTS = {ord("q"): 1, ord("r"): 4}
_STOP, _GLOBAL, _FRAME, _MARK = ord("."), ord("c"), 0x95, ord("(")
_UNMARKS = b"1tldeuo\x90\x91"
_MOST_MARKS = 10_000  # marks at a time: one for each level of nesting
_LONGEST_NAME = 1000
_MOST_NAMES = 1000
"""Classes and functions that one pickle names."""
_LONG, _LONG_BYTES, _MOST_ALIKE = 0x8A, 8, 256
"""Large ints that have the same hash: a dict with such keys takes time by their number squared."""


def scan(data: Readable, begin: int = 0) -> int:
    """Return the end of the pickle that begins at `begin`.

    Raises:
        UnpicklingError: It has opcodes that a saved state does not need, or lengths and memo
            indices that exceed the pickle.
    """
    at, end, marks = begin, len(data), 0
    alike: dict[int, set[bytes]] = {}
    while at < end:
        code = data[at]
        at += 1
        if (more := _FIXED.get(code)) is not None:
            if code == _STOP:
                return at
            if code == _FRAME and int.from_bytes(data[at : at + 8], "little") > end - at - 8:
                break
            if code == _MARK:
                marks += 1
                if marks > _MOST_MARKS:
                    raise pickle.UnpicklingError(f"more than {_MOST_MARKS} levels of nesting")
            elif code in _UNMARKS:
                marks -= 1
            at += more
        elif (more := _COUNTED.get(code)) is not None:
            size = int.from_bytes(data[at : at + more], "little")
            at += more + size
            if code == _LONG and size >= _LONG_BYTES:
                number = bytes(data[at - size : at])
                same = alike.setdefault(hash(int.from_bytes(number, "little", signed=True)), set())
                same.add(number)
                if len(same) > _MOST_ALIKE:
                    raise pickle.UnpicklingError("large ints that all have the same hash")
        elif (more := _PUTS.get(code)) is not None:
            index = int.from_bytes(data[at : at + more], "little")
            if index > at - begin:  # each entry of the memo takes at least a byte
                raise pickle.UnpicklingError(f"memo index {index} after {at - begin} bytes")
            at += more
        elif code == _GLOBAL:
            names = bytes(data[at : at + _LONGEST_NAME]).split(b"\n", 2)
            if len(names) < 3:
                raise pickle.UnpicklingError("a name without an end")
            at += len(names[0]) + len(names[1]) + 2
        else:
            raise pickle.UnpicklingError(f"opcode {code:#04x}, which no saved state needs")
    raise pickle.UnpicklingError("the pickle is truncated")


class Named:
    """Stands for the result of calling `name` with `args`, changed by `state`. `items` are those
    that were added to it; in a mapping, keys and items in turn."""

    name: str = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]
    is_mapping: bool

    def __new__(cls, *args: Any) -> Named:
        """Create an object, as the pickle requests."""
        made = super().__new__(cls)
        made.args, made.state, made.items, made.is_mapping = args, None, [], False
        return made

    def __setstate__(self, state: Any) -> None:
        """Set the state of an object, as the pickle requests."""
        self.state = state

    def append(self, item: Any) -> None:
        """Add an item of a subclass of list."""
        self.items.append(item)

    def __setitem__(self, key: Any, item: Any) -> None:
        """Add an item of a subclass of dict."""
        self.items += key, item
        self.is_mapping = True

    def __call__(self, *args: Any) -> Any:
        """Refuse a call such as that of a bound method, which torch also refuses."""
        raise pickle.UnpicklingError("Trying to call reduce for unrecognized function")


class PickleStructure(pickle.Unpickler):
    """Reads the structure of a pickle. `allowed` decides whether a full name may occur in it.
    `storage` is called with each persistent id."""

    def __init__(
        self,
        data: Readable,
        *,
        allowed: Callable[[str], bool],
        storage: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(
            data if isinstance(data, mmap.mmap) else io.BytesIO(data),
            encoding="utf-8",
            errors="surrogateescape",
        )
        self._allowed, self._storage = allowed, storage
        self._classes: dict[str, Any] = dict(_PLAIN)

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for a name. Immutable types are returned themselves."""
        full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
        if not self._allowed(full):
            raise pickle.UnpicklingError(f"{full} is not allowed in this pickle")
        if full not in self._classes:
            if len(self._classes) > len(_PLAIN) + _MOST_NAMES:
                raise pickle.UnpicklingError(f"more than {_MOST_NAMES} names of classes")
            self._classes[full] = type("Named", (Named,), {"name": full})
        return self._classes[full]

    def persistent_load(self, pid: Any) -> Any:
        """See Unpickler.persistent_load."""
        if self._storage is None:
            raise pickle.UnpicklingError("a reference to data outside the pickle")
        return self._storage(pid)


_PLAIN: Mapping[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    "builtins.set": set,
    **{
        f"torch.{name}": value
        for name, value in vars(torch).items()
        if isinstance(value, (torch.dtype, torch.layout))
    },
}
