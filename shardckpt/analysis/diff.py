"""Compare two checkpoints: by their digests where these decide, otherwise by value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import numpy as np
import torch

from shardckpt.analysis.entries import pieces, saved_entries, tensors_of, values_of
from shardckpt.api import Path
from shardckpt.checkpoint import Checkpoint
from shardckpt.convert.opening import open_source
from shardckpt.errors import StateError
from shardckpt.format import typed_json
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.format.dtype_names import itemsize
from shardckpt.format.dtypes import DTYPES, OPAQUE, memory_view
from shardckpt.format.entries import Box, TensorEntry
from shardckpt.maintenance.rewritable import Source
from shardckpt.reports import DiffReport, TensorDifference
from shardckpt.state.saved_tree import Renaming, Select
from shardckpt.storage.base import Storage

__all__ = ["diff"]


def diff(
    first: Path,
    second: Path,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    keys: Select = None,
    rename: Renaming = None,
    storage: Storage | None = None,
    progress: Callable[[int], None] = lambda read_bytes: None,
) -> DiffReport:
    """Compare two checkpoints of any format. Not collective.

    Two checkpoints of shardckpt are compared by the digests in their manifests: blocks with equal
    digests are equal, and are not read. Everything else is read and compared by value. Two NaN are
    equal, and so are 0.0 and -0.0. Elements may differ by `atol + rtol * abs(second)`.

    Tensors of different dtypes differ, if no tolerance is given. With a tolerance, which may be 0,
    their elements are compared in float64 or complex128, integers with integers exactly, and the
    report names the dtypes of those that are equal. Dtypes without arithmetic always differ from
    others.

    Args:
        first: A checkpoint, as `convert` takes it.
        second: Another one.
        rtol: The relative tolerance, by default 0. For values that were rounded to another dtype,
            pass its `torch.finfo(dtype).eps`.
        atol: The absolute tolerance, by default 0.
        keys: The names to compare, after `rename`; see `load`.
        rename: New names for the entries of `first`; see `load`.
        storage: The storage of both; see `save`.
        progress: Called with the bytes of tensors that were compared so far.

    Returns:
        The differences.

    Raises:
        CheckpointError: A checkpoint can't be read, or is corrupted.
        LoadMismatchError: `keys` or `rename` has a name that no entry of `first` has.
        StateError: A tolerance is invalid.
        StorageError: The file system refused an operation.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"w": torch.ones(3)}, "run/step-1")
        >>> report = shardckpt.convert("run/step-1", "run/step-1.pth")
        >>> shardckpt.diff("run/step-1", "run/step-1.pth").equal
        True
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (value is None or (isinstance(value, (int, float)) and 0 <= value < math.inf)):
            raise StateError(
                f"Invalid {name}",
                expected="a finite number of at least 0",
                actual=repr(value),
                remedy=f"pass such a number, or leave out {name}",
            )
    with (
        open_source(first, storage=storage) as one,
        open_source(second, storage=storage) as other,
    ):
        return _Comparison(one, other, rtol, atol, progress).report(keys, rename)


class _Comparison:
    def __init__(
        self,
        one: Source,
        other: Source,
        rtol: float | None,
        atol: float | None,
        progress: Callable[[int], None],
    ) -> None:
        self.one, self.other = one, other
        self.rtol, self.atol = rtol or 0.0, atol or 0.0
        self.across_dtypes = rtol is not None or atol is not None
        self.progress = progress
        self.bytes_read = self.compared_bytes = 0

    def report(self, keys: Select, rename: Renaming) -> DiffReport:
        one, other = self.one, self.other
        saved = saved_entries(one, keys=keys, rename=rename)
        others = saved_entries(other, keys=keys, check=False)
        names, other_names = tensors_of(saved), tensors_of(others)
        values, other_values = values_of(saved), values_of(others)
        mine, theirs = {**names, **values}, {**other_names, **other_values}
        # An entry that is a tensor in one checkpoint only is an entry of each.
        both_tensors = [name for name in names if name in other_names]
        both_values = [name for name in values if name in other_values]
        both = {*both_tensors, *both_values}
        different, dtypes = {}, {}
        for name in both_tensors:
            found = self.compare(names[name], other_names[name])
            if found is not None:
                different[name] = found
                continue
            one_dtype, other_dtype = self.dtypes(names[name], other_names[name])
            if one_dtype != other_dtype:
                dtypes[name] = one_dtype, other_dtype
        changed = {
            name: (values[name], other_values[name])
            for name in both_values
            if not _same(values[name], other_values[name])
        }
        return DiffReport(
            first=one.path,
            second=other.path,
            only_first=tuple(name for name in mine if name not in both),
            only_second=tuple(name for name in theirs if name not in both),
            tensors=different,
            values=changed,
            dtypes=dtypes,
            equal_tensors=len(both_tensors) - len(different),
            equal_values=len(both_values) - len(changed),
            bytes_read=self.bytes_read,
        )

    def dtypes(self, name: str, other_name: str) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of a tensor in both checkpoints."""
        tensors, others = self.one.manifest.tensors, self.other.manifest.tensors
        return DTYPES[tensors[name].dtype], DTYPES[others[other_name].dtype]

    def compare(self, name: str, other_name: str) -> TensorDifference | None:
        """Compare a tensor. Returns None if its elements are equal."""
        entry = self.one.manifest.tensors[name]
        other_entry = self.other.manifest.tensors[other_name]
        dtypes = self.dtypes(name, other_name)
        shapes = entry.shape, other_entry.shape
        comparable = dtypes[0] == dtypes[1] or (self.across_dtypes and not {*dtypes} & OPAQUE)
        if not comparable or shapes[0] != shapes[1]:
            return TensorDifference(dtypes=dtypes, shapes=shapes, elements=None, largest=None)
        elements, largest = 0, 0.0
        for box in self.boxes(entry, other_entry):
            for offsets, sizes in pieces(self.one, name, *box):
                a = self.one.read_box(name, offsets, sizes)
                b = self.other.read_box(other_name, offsets, sizes)
                self.bytes_read += a.nbytes
                count, most = count_differences(a, b, self.rtol, self.atol)
                elements += count
                largest = math.nan if math.isnan(most) else max(largest, most)
        self.compared_bytes += entry.size_bytes
        self.progress(self.compared_bytes)
        if not elements:
            return None
        known = None if dtypes[0] in OPAQUE else largest
        return TensorDifference(dtypes=dtypes, shapes=shapes, elements=elements, largest=known)

    def boxes(self, entry: TensorEntry, other_entry: TensorEntry) -> Iterator[Box]:
        """Yield the boxes of a tensor that may differ, as far as the digests show."""
        if not (isinstance(self.one, Checkpoint) and isinstance(self.other, Checkpoint)):
            yield (0,) * len(entry.shape), entry.shape
            return
        if entry.dtype != other_entry.dtype:
            yield (0,) * len(entry.shape), entry.shape
            return
        dims = len(entry.shape)
        others = {tuple(row[3:]): row for row in other_entry.chunks.tolist()}
        rows = entry.chunks.tolist()
        if {tuple(row[3:]) for row in rows} != others.keys():
            yield (0,) * dims, entry.shape
            return
        item = itemsize(entry.dtype)
        for row in rows:
            ranges = unequal_ranges(self.one, row, self.other, others[tuple(row[3:])])
            elements = ((begin // item, -(-end // item)) for begin, end in ranges)
            yield from row_boxes(tuple(row[3 : 3 + dims]), tuple(row[3 + dims :]), elements)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal, with their types. NaN is equal to NaN."""
    texts = [
        msgspec.json.encode(typed_json.encode(each, at=""), order="deterministic")
        for each in (value, other)
    ]
    return texts[0] == texts[1]


def unequal_ranges(
    one: Checkpoint, row: list[int], other: Checkpoint, other_row: list[int]
) -> Iterator[tuple[int, int]]:
    """Yield the ranges of bytes in which two chunks may differ, as their digests show.

    Blocks are compared if they begin at the same byte of both chunks. Otherwise the only range is
    the chunk.
    """
    (shard, begin, end), (other_shard, other_begin, _) = row[:3], other_row[:3]
    if begin == end:
        return
    if (begin - other_begin) % BLOCK_BYTES:
        yield 0, end - begin
        return
    low, high = begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1
    shift = other_begin // BLOCK_BYTES - low
    digests = one.manifest.shards[shard].digests[low:high]
    other_digests = other.manifest.shards[other_shard].digests[low + shift : high + shift]
    unequal = np.flatnonzero(digests != other_digests) + low
    for run in np.split(unequal, np.flatnonzero(np.diff(unequal) > 1) + 1):
        if len(run):
            first, last = int(run[0]) * BLOCK_BYTES, int(run[-1] + 1) * BLOCK_BYTES
            yield max(first, begin) - begin, min(last, end) - begin


def row_boxes(
    offsets: tuple[int, ...], sizes: tuple[int, ...], ranges: Iterable[tuple[int, int]]
) -> Iterator[Box]:
    """Yield boxes of rows that hold ranges of the elements of a chunk. No row is in two boxes.

    Args:
        offsets: The offset of the chunk in each dimension.
        sizes: Its size in each dimension.
        ranges: The begin and end of each range, in ascending order.
    """
    width = math.prod(sizes[1:])
    done = 0  # rows
    for begin, end in ranges:
        if not sizes:
            yield offsets, sizes
            continue
        low, high = max(begin // width, done), -(-end // width)
        if low < high:
            yield (offsets[0] + low, *offsets[1:]), (high - low, *sizes[1:])
            done = high


def count_differences(
    a: torch.Tensor, b: torch.Tensor, rtol: float = 0.0, atol: float = 0.0
) -> tuple[int, float]:
    """Return the number of different elements of two tensors of one shape, and the largest absolute
    difference. Tensors of different dtypes must have dtypes with arithmetic."""
    if a.dtype == b.dtype:
        integers = _INTEGERS[min(a.element_size(), 8)]  # torch can't index all dtypes
        bits = [memory_view(each).reshape(-1).view(integers) for each in (a, b)]
        unequal = bits[0] != bits[1]
        if a.element_size() > 8:  # complex128
            unequal = unequal.reshape(-1, 2).any(dim=1)
            bits = [each.reshape(-1, 2) for each in bits]
        if not unequal.any():
            return 0, 0.0
        if a.dtype in OPAQUE:
            return int(unequal.sum()), 0.0
        a, b = (each[unequal].reshape(-1).view(a.dtype) for each in bits)
    wide = torch.complex128 if a.dtype.is_complex or b.dtype.is_complex else torch.float64
    x, y = (each.reshape(-1).to(wide) for each in (a, b))
    gap = (x - y).abs()
    gap[x == y] = 0.0  # infinities
    if _is_integer(a) and _is_integer(b):  # float64 rounds large integers
        near = gap < 2.0**62
        gap[near] = (_modulo(a) - _modulo(b))[near].abs().double()
    close = (gap == 0) | (gap <= atol + rtol * y.abs()) & gap.isfinite() | (x.isnan() & y.isnan())
    gap = gap[~close]
    return len(gap), float(gap.max()) if len(gap) else 0.0


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def _modulo(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of integers or bools as int64, modulo 2**64."""
    flat = tensor.reshape(-1)
    return flat.view(torch.int64) if flat.dtype == torch.uint64 else flat.long()
