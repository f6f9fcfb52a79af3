"""Read and write the header of a shard, a safetensors file whose data begin on a page.

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

from shardckpt.errors import CorruptionError, StateError
from shardckpt.format.dtype_names import TORCH_NAMES, check_supported, itemsize, shard_form
from shardckpt.format.entries import Box

__all__ = [
    "HEADER_ALIGN",
    "ShardTensor",
    "build_header",
    "chunk_name",
    "header_bytes",
    "parse_chunk_name",
    "parse_header",
    "unique_keys",
]

HEADER_ALIGN = 4096
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTensor:
    """A tensor of a safetensors file. `begin` and `end` are its bytes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def chunk_name(
    name: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> str:
    """Return the name of a chunk in its shard.

    It is the name of the tensor, and the box unless it is the full tensor, such as
    `w[0:256,0:1024]`. The reserved name `__metadata__` always has the box.
    """
    if tuple(sizes) == tuple(shape) and name != "__metadata__":
        return name
    box = ",".join(f"{a}:{a + size}" for a, size in zip(offsets, sizes, strict=True))
    return f"{name}[{box}]"


def parse_chunk_name(text: str) -> tuple[str, Box | None]:
    """Parse the tensor and box (offsets, sizes) of a chunk. The box is None for a full tensor."""
    match = re.fullmatch(r"(.*)\[((?:\d+:\d+)(?:,\d+:\d+)*|)\]", text, re.DOTALL)
    if match is None:
        return text, None
    pairs = [part.split(":") for part in match[2].split(",")] if match[2] else []
    offsets = tuple(int(begin) for begin, _ in pairs)
    return match[1], (offsets, tuple(int(end) - int(begin) for begin, end in pairs))


def build_header(
    entries: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """Build the header of a shard. Its length is a multiple of HEADER_ALIGN.

    `entries` are (name, dtype, shape, size in bytes), in the order of the data.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, size_bytes in entries:
        if name in header:
            raise StateError(
                "A safetensors file can't hold a tensor with this name",
                tensor=name,
                remedy="rename it, or save to a path without a suffix",
            )
        begin, end = end, end + size_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = msgspec.json.encode(header)
    padded = text.ljust(-(-(len(text) + 8) // HEADER_ALIGN) * HEADER_ALIGN - 8)
    return struct.pack("<Q", len(padded)) + padded


def header_bytes(head: bytes, *, file_size_bytes: int, path: str) -> int:
    """Return the number of bytes before the data, from the first 8 bytes of the file.

    Raises:
        CorruptionError: The number is invalid.
    """
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
    """Parse the header of a safetensors file, and check all rules of the format.

    Args:
        data: The bytes before the data of the tensors.
        file_size_bytes: The size of the file. If None, the file may be truncated.
        path: The path for error messages.

    Returns:
        The tensors in the order of the file, and the metadata.

    Raises:
        CorruptionError: The header violates the format.
    """
    size = header_bytes(data[:8], file_size_bytes=file_size_bytes or len(data), path=path)
    text = data[8:size]
    if len(text) != size - 8 or text[:1] != b"{":
        raise _broken(path, 'a header that begins with "{"', repr(text[:16]))
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
        metadata = msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
        entries = msgspec.convert(header, dict[str, _Tensor])
    except (ValueError, RecursionError) as error:
        raise _broken(path, "a safetensors header", str(error)[:200]) from error
    at = size
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = (offset + size for offset in entry.data_offsets)
        check_supported(entry.dtype, tensor=name, path=path)
        if not _known(entry.dtype) or any(n < 0 for n in entry.shape) or len(entry.shape) > 64:
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


def _known(dtype: str) -> bool:
    return dtype in TORCH_NAMES and shard_form(dtype, ()) == (dtype, ())


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build the dict of a JSON object. Raises ValueError if a key occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _broken(path: str, expected: str, actual: object, tensor: str | None = None) -> CorruptionError:
    return CorruptionError(
        "A shard violates the safetensors format",
        path=path,
        tensor=tensor,
        expected=expected,
        actual=actual,
        remedy="load another checkpoint",
    )
