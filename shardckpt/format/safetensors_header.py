"""A shard is a safetensors file whose header is padded, so that data begin on a page.

Layout: 8 bytes with the length of the header (little-endian), the header (JSON, padded with
spaces), the data. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shardckpt.errors import CorruptionError
from shardckpt.format.dtypes import DTYPES, itemsize

__all__ = [
    "HEADER_ALIGN",
    "ShardTensor",
    "build_header",
    "chunk_name",
    "header_bytes",
    "parse_chunk_name",
    "parse_header",
]

HEADER_ALIGN = 4096
_HEADER_LIMIT = 100_000_000  # as the safetensors library has it

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTensor:
    """A tensor of a safetensors file; `begin` and `end` are bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def chunk_name(
    name: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> str:
    """What a chunk is called in its shard: the tensor's name if it is all of it, else with the
    box, as in `w[0:256,0:1024]`. (The name `__metadata__` is reserved, and always has the box.)"""
    if tuple(sizes) == tuple(shape) and name != "__metadata__":
        return name
    box = ",".join(f"{a}:{a + size}" for a, size in zip(offsets, sizes, strict=True))
    return f"{name}[{box}]"


def parse_chunk_name(text: str) -> tuple[str, Box | None]:
    """The name and box (offsets, sizes) of a chunk; no box for one that is the whole tensor."""
    found = re.fullmatch(r"(.*)\[((?:\d+:\d+)(?:,\d+:\d+)*|)\]", text, re.DOTALL)
    if found is None:
        return text, None
    pairs = [part.split(":") for part in found[2].split(",")] if found[2] else []
    offsets = tuple(int(begin) for begin, _ in pairs)
    return found[1], (offsets, tuple(int(end) - int(begin) for begin, end in pairs))


def build_header(
    entries: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a shard, a multiple of HEADER_ALIGN.

    `entries` are (name, dtype, shape, size in bytes), in the order of the data.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, size_bytes in entries:
        begin, end = end, end + size_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = msgspec.json.encode(header)
    padded = text.ljust(-(-(len(text) + 8) // HEADER_ALIGN) * HEADER_ALIGN - 8)
    return struct.pack("<Q", len(padded)) + padded


def header_bytes(head: bytes, *, file_size_bytes: int, path: str) -> int:
    """How many bytes come before the data, from a file's first 8; checked before they are read."""
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
    if not 2 <= length <= min(_HEADER_LIMIT, file_size_bytes - 8):
        raise _broken(path, f"a header of 2 to {_HEADER_LIMIT} bytes within the file", length)
    return int(length) + 8


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def parse_header(
    data: bytes, *, file_size_bytes: int | None, path: str
) -> tuple[list[ShardTensor], dict[str, str]]:
    """The tensors of a safetensors file in file order, and its metadata.

    `data` are the bytes before the tensors' data. Every rule of safetensors is enforced;
    CorruptionError names the path and the tensor. No `file_size_bytes`: the file may be cut.
    """
    size = header_bytes(data[:8], file_size_bytes=file_size_bytes or len(data), path=path)
    text = data[8:size]
    if len(text) != size - 8 or text[:1] != b"{":
        raise _broken(path, 'a header that begins with "{"', repr(text[:16]))
    try:
        header = json.loads(text, object_pairs_hook=_each_once)
        metadata = msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
        entries = msgspec.convert(header, dict[str, _Tensor])
    except (ValueError, RecursionError) as error:
        raise _broken(path, "a safetensors header", str(error)[:200]) from error
    at = size
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = (offset + size for offset in entry.data_offsets)
        if entry.dtype not in DTYPES or any(n < 0 for n in entry.shape) or len(entry.shape) > 64:
            raise _broken(path, "a known dtype and a shape", f"{entry.dtype} {entry.shape}", name)
        volume = math.prod(entry.shape) * itemsize(entry.dtype)
        if begin != at or end - begin != volume:
            raise _broken(path, f"bytes {at} to {at + volume}", f"{begin} to {end}", name)
        at = end
        tensors.append(
            ShardTensor(
                name=name, dtype=entry.dtype, shape=tuple(entry.shape), begin=begin, end=end
            )
        )
    if file_size_bytes is not None and at != file_size_bytes:
        raise _broken(path, f"a file of {at} bytes", f"{file_size_bytes} bytes")
    return tensors, metadata


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _broken(path: str, expected: str, actual: object, tensor: str | None = None) -> CorruptionError:
    return CorruptionError(
        "A shard breaks the rules of the safetensors format",
        path=path,
        tensor=tensor,
        expected=expected,
        actual=actual,
        remedy="load another checkpoint",
    )
