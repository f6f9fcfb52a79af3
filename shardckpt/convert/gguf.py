"""Read files of llama.cpp, `.gguf`: a flat state of the tensors that are not quantized.

Quantized tensors and the description of the model are left out, and listed by name. Source of the
format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import struct
from functools import partial
from typing import Any, NamedTuple

import torch

from shardckpt.convert.boxes import read_rows
from shardckpt.convert.foreign_file import mapped, open_regular
from shardckpt.convert.sources import Foreign, Origin, foreign
from shardckpt.errors import CorruptionError, NotACheckpointError, ShardckptError
from shardckpt.storage.posix import translated

__all__ = ["GGUF_SUFFIX", "open_gguf"]

GGUF_SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_MOST_DIMS, _MOST_KEYS, _MOST_ENTRIES = 4, 100, 1 << 16
_MOST_HEADER_BYTES, _MOST_TEXTS = 64 << 20, 1 << 20
_DTYPES = {
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32,
    27: torch.int64, 28: torch.float64, 30: torch.bfloat16,
}  # fmt: skip
_QUANTIZED = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_VALUES = "BbHhIif?sxQqd"
"""The struct formats of values, by the number of their type. `s` is a text, and `x` is an array."""


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


class _Header:
    """Reads the numbers and texts of a header, one after another."""

    def __init__(self, data: Any) -> None:
        self.data, self.at, self.skipped_texts = data, 0, 0
        self.end = min(len(data), _MOST_HEADER_BYTES)

    def numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        found = struct.unpack_from(form, self.data, self.at)
        self._skip(struct.calcsize(form))
        return found

    def text(self) -> str:
        (length,) = self.numbers("Q")
        begin = self.at
        self._skip(length)
        return str(self.data[begin : self.at], "utf-8")

    def value(self) -> Any:
        """Read a value of the description. The items of an array are skipped: nothing uses them."""
        (type_number,) = self.numbers("I")
        form = _VALUES[type_number]
        if form == "x":
            return self._skip_array()
        return self.text() if form == "s" else self.numbers(form)[0]

    def _skip_array(self) -> None:
        type_number, length = self.numbers("IQ")
        form = _VALUES[type_number]
        if form == "x":
            raise ValueError("an array of arrays")
        if form == "s":
            self._skip_texts(length)
        else:
            self._skip(length * struct.calcsize(f"<{form}"))

    def _skip_texts(self, count: int) -> None:
        self.skipped_texts += count
        if self.skipped_texts > _MOST_TEXTS:
            raise ValueError(f"arrays of more than {_MOST_TEXTS} texts")
        at, length = self.at, struct.Struct("<Q")
        for _ in range(count):
            at += length.size + length.unpack_from(self.data, at)[0]
            if at > self.end:
                break
        self._skip(at - self.at)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > self.end:
            raise ValueError(
                f"a header that ends behind the file, or has more than {_MOST_HEADER_BYTES} bytes"
            )


def open_gguf(path: str) -> Foreign:
    """Open a file of llama.cpp as a source. It has no checksums to verify.

    Raises:
        NotACheckpointError: The file is not a GGUF file of version 2 or 3.
        CorruptionError: The file is invalid, or declares more than it holds.
    """
    try:
        with translated(path), mapped(path) as data:
            return _opened(path, data, len(data))
    except ShardckptError:
        raise
    except (struct.error, ValueError, IndexError, OverflowError, MemoryError) as error:
        raise _invalid(path, str(error)) from error


def _opened(path: str, data: Any, size_bytes: int) -> Foreign:
    header = _Header(data)
    _check_version(path, data[:8])
    header.numbers("8x")
    count, values = header.numbers("QQ")
    if max(count, values) > _MOST_ENTRIES:
        raise ValueError(f"{count} tensors and {values} other entries")
    described: dict[str, Any] = {}
    for _ in range(values):
        key = header.text()
        if key in described:
            raise ValueError(f"two values {key!r}")
        described[key] = header.value()
    tensors = [_tensor(header) for _ in range(count)]
    alignment = described.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise ValueError(f"the alignment {alignment}")
    begin = -(-header.at // alignment) * alignment
    left_out: dict[str, str] = {}
    state: dict[str, torch.Tensor] = {}
    reads = {}
    for tensor in tensors:
        if tensor.name in state or tensor.name in left_out:
            raise ValueError(f"two tensors {tensor.name!r}")
        dtype = _DTYPES.get(tensor.type_number)
        if dtype is None:
            unknown = f"the unknown type {tensor.type_number}"
            left_out[tensor.name] = f"is quantized: {_QUANTIZED.get(tensor.type_number, unknown)}"
            continue
        at = begin + tensor.offset
        if at + math.prod(tensor.shape) * dtype.itemsize > size_bytes:
            raise ValueError(f"{tensor.name!r} ends behind the end of the file")
        state[tensor.name] = torch.empty((), dtype=dtype, device="cpu").expand(tensor.shape)
        reads[id(state[tensor.name])] = partial(_read_box, path, at, dtype, tensor.shape)
    if isinstance(files := described.get("split.count"), int) and files > 1:
        left_out["the other files"] = f"hold the rest of this model, of {files} files: convert each"
    if described:
        keys = ", ".join(itertools.islice(described, _MOST_KEYS))
        left_out.setdefault("metadata", f"describes the model: {keys}")
    origin = Origin(format="a file of llama.cpp", left_out=left_out)
    return foreign(path, "GGUF", state, reads=reads, identity=size_bytes, origin=origin)


def _check_version(path: str, head: bytes) -> None:
    magic, version = head[:4], int.from_bytes(head[4:], "little")
    if magic == b"GGUF" and version in _VERSIONS:
        return
    big_endian = int.from_bytes(head[4:], "big") in _VERSIONS
    actual = "a big-endian file" if big_endian else f"version {version}"
    raise NotACheckpointError(
        "The file is not a GGUF file that can be read",
        path=path,
        expected="GGUF of version 2 or 3, little-endian",
        actual=actual if magic == b"GGUF" else f"a file that begins {magic!r}",
        remedy="check the path, or convert the model to GGUF again",
    )


def _tensor(header: _Header) -> _Tensor:
    name = header.text()
    (dims,) = header.numbers("I")
    if dims > _MOST_DIMS:
        raise ValueError(f"{name!r} of {dims} dimensions")
    sizes = header.numbers(f"{dims}Q" if dims else "")
    if math.prod(sizes) >= 1 << 60:
        raise ValueError(f"{name!r} of shape {list(sizes)}")
    type_number, offset = header.numbers("IQ")
    return _Tensor(name, tuple(reversed(sizes)), type_number, offset)  # the last one varies fastest


def _read_box(
    path: str,
    begin: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> torch.Tensor:
    """Read a box of a tensor whose elements begin at byte `begin`."""

    def read(first: int, end: int) -> torch.Tensor:
        flat = torch.empty(end - first, dtype=dtype, device="cpu")
        with translated(path), open_regular(path) as file:
            file.seek(begin + first * dtype.itemsize)
            size = file.readinto(flat.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        if size != flat.nbytes:
            raise _invalid(path, f"{size} of {flat.nbytes} bytes of a tensor")
        return flat

    return read_rows(shape, offsets, sizes, read)


def _invalid(path: str, actual: str) -> CorruptionError:
    return CorruptionError(
        "This file of llama.cpp is corrupted, or declares more than it holds",
        path=path,
        expected="a .gguf file, as llama.cpp writes it",
        actual=actual[:200],
        remedy="load another checkpoint",
    )
