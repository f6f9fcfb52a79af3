"""A manifest that is parsed on demand.

To read a few rows of a large checkpoint, the text of the manifest is scanned, which is much faster
than parsing all of it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from shardckpt.format.divided_manifest import LONG_BYTES, listed_tensor
from shardckpt.format.dtype_names import is_supported, itemsize
from shardckpt.format.entries import ShardEntry, TensorEntry
from shardckpt.format.manifest import MOST_DIMS, ShardText, TensorText, shard_entries
from shardckpt.format.validation import refuse

__all__ = ["LazyManifest"]


LARGE_OBJECT_BYTES = 4 << 20
"""The text of a large object, in bytes."""
_MANY = 100_000  # tensors
_MOST_SEARCHES = 4

# The members of an object that is decoded at once, or Raw.
_Members = TypeVar("_Members", dict[str, msgspec.Raw], msgspec.Raw)


class _Document(msgspec.Struct, Generic[_Members]):
    shards: list[ShardText]
    tensors: _Members
    state: msgspec.Raw


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    chunks: list[int]


_decode = msgspec.json.Decoder(_Document[dict[str, msgspec.Raw]]).decode
_decode_many = msgspec.json.Decoder(_Document[msgspec.Raw]).decode
_decode_list = msgspec.json.Decoder(TensorText[msgspec.Raw]).decode
_decode_tensor = msgspec.json.Decoder(_Tensor).decode
_decode_level = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_reference = msgspec.json.Decoder(dict[str, str]).decode
_ERRORS = msgspec.MsgspecError, UnicodeError, RecursionError


class LazyManifest:
    """A manifest whose entries are parsed on demand. Its text has passed check_text.

    `shards` maps numbers to shards, with the checks of from_bytes. Tensors are described only if
    their own chunks are valid at first sight, as nearly all are. For any other tensor the answer is
    None, and the caller uses from_bytes, which describes it or raises an error. Only from_bytes
    checks tensors against each other.
    """

    def __init__(self, data: bytes, *, path: str) -> None:
        many = len(data) > LARGE_OBJECT_BYTES and data.count(b'"dtype"') > _MANY
        try:
            document: _Document[Any] = (_decode_many if many else _decode)(data)
        except _ERRORS as error:
            refuse(path, "the members of format version 1", str(error)[:200])
        self._path = path
        self._shards = document.shards
        self._texts = _Object(document.tensors)
        self._state = document.state
        self._levels: dict[str, _Object] = {}  # dicts of the state, by name
        self.shards = _Shards(document.shards, path)
        self.tensors: dict[str, TensorEntry] = {}  # parsed so far

    def all_shards(self) -> tuple[ShardEntry, ...]:
        """Return all shards in order.

        Raises:
            CorruptionError: A shard is invalid, or two shards have the same name.
        """
        return tuple(shard_entries(self._shards, self._path))

    def find(self, name: str) -> str | None:
        """Return the name of the saved tensor or array of an entry of the state.

        Returns None unless exactly one path of string keys leads to a tensor under that name.
        """
        node, at = self._state, 0
        while True:
            if (level := self._levels.get(name[:at])) is None:
                level = self._levels[name[:at]] = _Object(node)
            dots = [index for index in range(at, len(name)) if name[index] == "."]
            members = level.find(["", *(name[at:end] for end in (*dots, len(name)))])
            if len(members) != 1 or "" in members:
                return None
            ((key, node),) = members.items()
            at += len(key) + 1
            if at > len(name):
                return _target(node)

    def tensor(self, name: str) -> TensorEntry | None:
        """Return a saved tensor, which is kept in `tensors`. None if from_bytes is needed.

        Raises:
            CorruptionError: The manifest describes a shard of the tensor incorrectly.
        """
        if name not in self.tensors:
            try:
                (text,) = self._texts.find([name]).values()
                if len(memoryview(text)) > LONG_BYTES:
                    return self._listed(name, _decode_list(text))
                decoded = _decode_tensor(text)
            except (ValueError, *_ERRORS):
                return None
            width = 3 + 2 * len(decoded.shape)
            rows = [decoded.chunks[at : at + width] for at in range(0, len(decoded.chunks), width)]
            if not is_supported(decoded.dtype) or not self._are_slabs(decoded, rows):
                return None
            chunks = np.array(rows, dtype=np.int64)
            entry = TensorEntry(dtype=decoded.dtype, shape=tuple(decoded.shape), chunks=chunks)
            self.tensors[name] = entry
        return self.tensors[name]

    def _listed(self, name: str, text: TensorText[msgspec.Raw]) -> TensorEntry | None:
        """Return a tensor with a long list of chunks, which checks those that are read."""
        known = is_supported(text.dtype) and len(text.shape) <= MOST_DIMS
        if not known or not text.shape or min(text.shape) < 1 or math.prod(text.shape) >= 1 << 60:
            return None
        try:
            sizes = np.array([shard.size for shard in self._shards], np.int64)
        except OverflowError:
            return None
        entry = listed_tensor(name, text, shard_sizes=sizes, path=self._path)
        self.tensors[name] = entry
        return entry

    def _are_slabs(self, tensor: _Tensor, rows: list[list[int]]) -> bool:
        """Whether the chunks divide the tensor along one dimension, in order, and occupy separate
        bytes of the right size in their shards. This implies the rules of check_chunks."""
        shape, item, dims = tensor.shape, itemsize(tensor.dtype), len(tensor.shape)
        if not rows or len(rows[-1]) != 3 + 2 * dims or not dims or min(shape) < 1:
            return False
        cut = next((d for d in range(dims) if rows[0][3 + dims + d] != shape[d]), 0)
        at = 0
        for shard, begin, end, *box in rows:
            length = box[dims + cut]
            slab = [*([0] * dims), *shape]
            slab[cut], slab[dims + cut] = at, length
            if box != slab or length < 1 or not 0 <= shard < len(self._shards):
                return False
            if begin < 8 or begin % item or end > self.shards[shard].size_bytes:
                return False
            if end - begin != math.prod(box[dims:]) * item:
                return False
            at += length
        neighbours = itertools.pairwise(sorted(row[:3] for row in rows))
        separate = all(one[0] < other[0] or one[2] <= other[1] for one, other in neighbours)
        return separate and at == shape[cut]


class _Object:
    """The members of a JSON object.

    A large object is searched for single names. Its members are all decoded, which takes much more
    memory, only if it is searched repeatedly.

    Args:
        members: The members, or the text of the object. Text of anything else has no members.
    """

    def __init__(self, members: dict[str, msgspec.Raw] | msgspec.Raw) -> None:
        self._members = members
        self._searches = 0

    def find(self, names: Iterable[str]) -> dict[str, msgspec.Raw]:
        """Return the members that have one of the names."""
        names = list(dict.fromkeys(names))
        members = self._members
        if not isinstance(members, dict):
            large = len(memoryview(members)) > LARGE_OBJECT_BYTES
            self._searches += 1
            try:
                if large and self._searches <= _MOST_SEARCHES and not any(map(_escaped, names)):
                    return _search(members, names)
                members = _decode_level(members)
            except _ERRORS:  # not an object
                members = {}
            self._members = members
        return {name: members[name] for name in names if name in members}


def _search(text: msgspec.Raw, names: list[str]) -> dict[str, msgspec.Raw]:
    """Decode the members of an object that have one of the names, and skip the others."""
    fields = [f"_{number}" for number in range(len(names))]
    optional = msgspec.Raw | msgspec.UnsetType
    wanted = msgspec.defstruct(
        "wanted",
        [(field, optional, msgspec.UNSET) for field in fields],
        rename=dict(zip(fields, names, strict=True)),
    )
    found = msgspec.structs.astuple(msgspec.json.decode(text, type=wanted))
    return {name: raw for name, raw in zip(names, found, strict=True) if raw is not msgspec.UNSET}


_escaped = re.compile(r'[\\"\x00-\x1f\ud800-\udfff]').search  # msgspec has no fields of such names


class _Shards(dict[int, ShardEntry]):
    """Shards by number, parsed at first access."""

    def __init__(self, texts: list[ShardText], path: str) -> None:
        self._texts = texts
        self._path = path

    def __missing__(self, number: int) -> ShardEntry:
        (self[number],) = shard_entries([self._texts[number]], self._path)
        return self[number]


def _target(node: msgspec.Raw) -> str | None:
    """Return the tensor that a node of the state refers to. None if the node is not a reference."""
    try:
        reference = _decode_reference(node)
    except _ERRORS:
        return None
    (key, name), *more = reference.items() or [("", "")]
    return name if not more and key in ("$tensor", "$ndarray") else None
