"""Read `.npz` files of numpy, without pickles: a flat state of tensors.

Each member is a `.npy` file: a header with the dtype and shape, and the elements. Arrays of objects
and of dtypes that torch lacks are left out.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy

from shardckpt.convert.foreign_file import check_regular, open_regular
from shardckpt.convert.sources import Foreign, Origin, foreign
from shardckpt.errors import CorruptionError, ShardckptError
from shardckpt.state.local_chunks import box_slices
from shardckpt.storage.posix import translated

__all__ = ["NPZ_SUFFIX", "open_npz"]

NPZ_SUFFIX = ".npz"
_MEMBER = ".npy"
_SPREAD, _SPREAD_BYTES = 64, 64 << 20
"""Compressed arrays may take so many times the bytes of the file, and so many bytes more."""
_INVALID = (
    zipfile.BadZipFile, zlib.error, struct.error, ValueError, TypeError, EOFError, KeyError,
    NotImplementedError, RuntimeError, SyntaxError, tokenize.TokenError,
)  # fmt: skip


class _Array(NamedTuple):
    member: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Any
    begin: int


def open_npz(path: str, *, check: bool) -> Foreign:
    """Open a `.npz` file as a source. `check`: verify its checksums now.

    Raises:
        CorruptionError: The file is invalid, or declares more than it holds.
    """
    try:
        with translated(path):
            return _opened(path, check=check)
    except ShardckptError:
        raise
    except _INVALID as error:
        raise _invalid(path, f"{type(error).__name__}: {error}") from error


def _opened(path: str, *, check: bool) -> Foreign:
    size = check_regular(path).st_size
    left_out: dict[str, str] = {}
    state: dict[str, torch.Tensor] = {}
    reads = {}
    files = ExitStack()
    try:
        archive = files.enter_context(zipfile.ZipFile(files.enter_context(open_regular(path))))
        arrays = _Arrays(path, archive)
        total = sum(info.file_size for info in archive.infolist())
        if total > (limit := _SPREAD * size + _SPREAD_BYTES):
            raise _invalid(path, f"{total} bytes of arrays, and {limit} at most")
        for info in archive.infolist():
            name = info.filename.removesuffix(_MEMBER)
            if name in state or name in left_out:
                raise ValueError(f"two arrays {name!r}")
            if name == info.filename:
                left_out[name] = "is not an array"
                continue
            array = _described(archive, info)
            dtype = _torch_dtype(array.dtype)
            if dtype is None:
                left_out[name] = f"an array of {array.dtype}"
                continue
            state[name] = torch.empty((), dtype=dtype, device="cpu").expand(array.shape)
            reads[id(state[name])] = partial(arrays.read_box, array)
        if left_out and set(left_out) == {info.filename for info in archive.infolist()}:
            raise _invalid(path, "an archive without arrays")
        if check and (bad := archive.testzip()) is not None:
            raise _invalid(path, f"{bad} does not match its checksum")
        origin = Origin(format="a file of numpy", left_out=left_out)
        return foreign(
            path, "npz", state, reads=reads, identity=size, origin=origin, close=files.close
        )
    except BaseException:
        files.close()
        raise


def _described(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Array:
    """Read the header of a member."""
    with archive.open(info) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        begin = file.tell()
    if any(n < 0 for n in shape):
        raise ValueError(f"the shape {shape}")
    in_file = info.file_size - begin
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != in_file:
        raise ValueError(f"{info.filename} of shape {list(shape)} in {in_file} bytes")
    return _Array(info.filename, dtype, tuple(shape), "F" if fortran else "C", begin)


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    if dtype.hasobject or dtype.kind not in "biufc":
        return None
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError:  # such as longdouble
        return None


class _Arrays:
    """Reads arrays of an open archive. Keeps the last one: its boxes are read one after another."""

    def __init__(self, path: str, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self._last: tuple[str, np.ndarray[Any, Any]] | None = None

    def read_box(
        self, array: _Array, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> torch.Tensor:
        """Read a box of an array."""
        last = self._last
        if last is None or last[0] != array.member:
            self._last = None  # so that only one array is in memory
            self._last = last = array.member, self._read(array)
        box = last[1][box_slices((0,) * len(sizes), offsets, sizes)]
        return torch.from_numpy(np.array(box, dtype=array.dtype.newbyteorder("="), order="C"))

    def _read(self, array: _Array) -> np.ndarray[Any, Any]:
        try:
            with translated(self.path):
                data = self.archive.read(array.member)
            flat = np.frombuffer(data, array.dtype, offset=array.begin)
            return flat.reshape(array.shape, order=array.order)
        except _INVALID as error:
            raise _invalid(self.path, f"{array.member}: {error}") from error


def _invalid(path: str, actual: str) -> CorruptionError:
    return CorruptionError(
        "This file of numpy is corrupted, or declares more than it holds",
        path=path,
        expected="a .npz file, as numpy.savez writes it",
        actual=actual[:200],
        remedy="load another checkpoint",
    )
