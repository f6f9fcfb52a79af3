"""A manifest that is parsed on demand.

To read a few rows of a large checkpoint, the text of the manifest is scanned, which is much faster
than parsing all of it.
"""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np

from shardckpt.format.dtype_names import is_supported, itemsize
from shardckpt.format.entries import ShardEntry, TensorEntry
from shardckpt.format.manifest import ShardText, shard_entries
from shardckpt.format.validation import refuse

__all__ = ["LazyManifest"]


class _Document(msgspec.Struct):
    shards: list[ShardText]
    tensors: dict[str, msgspec.Raw]
    state: msgspec.Raw


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    chunks: list[int]


_decode = msgspec.json.Decoder(_Document).decode
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
        try:
            self._document = _decode(data)
        except _ERRORS as error:
            refuse(path, "the members of format version 1", str(error)[:200])
        self._path = path
        self._levels: dict[str, dict[str, msgspec.Raw]] = {}  # parsed dicts of the state, by name
        self.shards = _Shards(self._document.shards, path)
        self.tensors: dict[str, TensorEntry] = {}  # parsed so far

    def all_shards(self) -> tuple[ShardEntry, ...]:
        """Return all shards in order.

        Raises:
            CorruptionError: A shard is invalid, or two shards have the same name.
        """
        return tuple(shard_entries(self._document.shards, self._path))

    def find(self, name: str) -> str | None:
        """Return the name of the saved tensor or array of an entry of the state.

        Returns None unless exactly one path of string keys leads to a tensor under that name.
        """
        node, at = self._document.state, 0
        while True:
            level = self._level(name[:at], node)
            dots = [index for index in range(at, len(name)) if name[index] == "."]
            ends = [end for end in (*dots, len(name)) if name[at:end] in level]
            if len(ends) != 1 or "" in level:
                return None
            node, at = level[name[at : ends[0]]], ends[0] + 1
            if at > len(name):
                return _target(node)

    def _level(self, name: str, node: msgspec.Raw) -> dict[str, msgspec.Raw]:
        if name not in self._levels:
            try:
                self._levels[name] = _decode_level(node)
            except _ERRORS:  # not an object
                self._levels[name] = {}
        return self._levels[name]

    def tensor(self, name: str) -> TensorEntry | None:
        """Return a saved tensor, which is kept in `tensors`. None if from_bytes is needed.

        Raises:
            CorruptionError: The manifest describes a shard of the tensor incorrectly.
        """
        if name not in self.tensors:
            try:
                decoded = _decode_tensor(self._document.tensors[name])
            except (KeyError, *_ERRORS):
                return None
            width = 3 + 2 * len(decoded.shape)
            rows = [decoded.chunks[at : at + width] for at in range(0, len(decoded.chunks), width)]
            if not is_supported(decoded.dtype) or not self._are_slabs(decoded, rows):
                return None
            chunks = np.array(rows, dtype=np.int64)
            entry = TensorEntry(dtype=decoded.dtype, shape=tuple(decoded.shape), chunks=chunks)
            self.tensors[name] = entry
        return self.tensors[name]

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
            if box != slab or length < 1 or not 0 <= shard < len(self._document.shards):
                return False
            if begin < 8 or begin % item or end > self.shards[shard].size_bytes:
                return False
            if end - begin != math.prod(box[dims:]) * item:
                return False
            at += length
        neighbours = itertools.pairwise(sorted(row[:3] for row in rows))
        separate = all(one[0] < other[0] or one[2] <= other[1] for one, other in neighbours)
        return separate and at == shape[cut]


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
