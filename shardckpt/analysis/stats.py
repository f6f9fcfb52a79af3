"""Statistics of the tensors of a checkpoint."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import torch

from shardckpt.analysis.entries import pieces, saved_entries, tensors_of
from shardckpt.api import Path
from shardckpt.checkpoint import Checkpoint
from shardckpt.convert.opening import open_source
from shardckpt.format.dtypes import DTYPES, OPAQUE
from shardckpt.maintenance.rewritable import Source
from shardckpt.reports import TensorStats
from shardckpt.state.saved_tree import Renaming, SavedState, Select
from shardckpt.storage.base import Storage

__all__ = ["stats", "tensor_stats"]


def stats(
    path: Path,
    *,
    keys: Select = None,
    rename: Renaming = None,
    storage: Storage | None = None,
    progress: Callable[[int], None] = lambda read_bytes: None,
) -> dict[str, TensorStats]:
    """Return statistics of each tensor of a checkpoint of any format. Not collective.

    Tensors of a checkpoint of shardckpt are read by one thread for each processor. Memory: a few
    buffers for each thread. Tensors without arithmetic, such as those of fp4, are left out.

    Args:
        path: A checkpoint, as `convert` takes it.
        keys: The names of the tensors, after `rename`; see `load`.
        rename: New names; see `load`.
        storage: See `save`.
        progress: Called with the bytes read so far.

    Returns:
        The statistics by name, in the order of the checkpoint.

    Raises:
        CheckpointError: The checkpoint can't be read, or is corrupted.
        LoadMismatchError: `keys` or `rename` has a name that no saved entry has.
        StorageError: The file system refused an operation.

    Example:
        >>> import torch, shardckpt
        >>> report = shardckpt.save({"w": torch.tensor([3.0, 4.0])}, "run/step-1")
        >>> shardckpt.stats("run/step-1")["w"].norm
        5.0
    """
    with open_source(path, storage=storage) as source:
        saved = saved_entries(source, keys=keys, rename=rename)
        return tensor_stats(source, saved, progress=progress)


def tensor_stats(
    source: Source,
    saved: SavedState,
    *,
    skip: Collection[str] = (),
    progress: Callable[[int], None] = lambda read_bytes: None,
) -> dict[str, TensorStats]:
    """Return what `stats` returns, for an open source and its saved entries.

    The tensors in `skip`, by their names in the manifest, are left out.
    """
    names = {
        name: saved_name
        for name, saved_name in tensors_of(saved).items()
        if DTYPES[source.manifest.tensors[saved_name].dtype] not in OPAQUE
        and saved_name not in skip
    }
    measure = functools.partial(_measure, source)
    threads = (os.cpu_count() or 1) if isinstance(source, Checkpoint) else 1
    found, read_bytes = {}, 0
    with ThreadPoolExecutor(threads, "shardckpt-stats") as pool:
        for name, one in zip(names, pool.map(measure, names.values()), strict=True):
            found[name] = one
            read_bytes += source.manifest.tensors[names[name]].size_bytes
            progress(read_bytes)
    return found


def _measure(source: Source, name: str) -> TensorStats:
    entry = source.manifest.tensors[name]
    dtype = DTYPES[entry.dtype]
    norm = mean = 0.0
    ranges: list[int | float] = []
    nan = inf = zeros = finite = 0
    for offsets, sizes in pieces(source, name, (0,) * len(entry.shape), entry.shape):
        saved = source.read_box(name, offsets, sizes).reshape(-1)
        piece = saved.to(torch.complex128 if dtype.is_complex else torch.float64)
        nan += int(piece.isnan().sum())
        inf += int(piece.isinf().sum())
        zeros += int((piece == 0).sum())
        piece = piece[piece.isfinite()]
        finite += len(piece)
        norm = math.hypot(norm, _norm(piece))
        if len(piece) and not dtype.is_complex:
            share = len(piece) / finite
            mean = mean * (1 - share) + _mean(piece) * share
            ranges += _range(saved) if saved.dtype in _INTEGERS else _range(piece)
    ordered = len(ranges) > 0
    return TensorStats(
        dtype=dtype,
        shape=entry.shape,
        norm=norm,
        smallest=min(ranges) if ordered else None,
        largest=max(ranges) if ordered else None,
        mean=mean if ordered else None,
        nan=nan,
        inf=inf,
        zeros=zeros,
    )


_INTEGERS = {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
_INTEGERS |= {torch.int8, torch.int16, torch.int32, torch.int64}


def _range(piece: torch.Tensor) -> list[int | float]:
    """Return the smallest and the largest element, exactly. torch does not order uint64."""
    array = piece.numpy()
    return [array.min().item(), array.max().item()]


def _mean(piece: torch.Tensor) -> float:
    """Return the mean of finite float64, even if their sum overflows."""
    total = float(piece.sum())
    return total / len(piece) if math.isfinite(total) else float((piece / len(piece)).sum())


def _norm(piece: torch.Tensor) -> float:
    """Return the Euclidean norm of finite float64 or complex128, even if a square overflows."""
    size = (torch.view_as_real(piece) if piece.is_complex() else piece).abs()
    squares = float(size.square().sum())
    if 1e-200 < squares < math.inf or not len(size):
        return math.sqrt(squares)
    largest = float(size.max())
    return largest * math.sqrt(float((size / largest).square().sum())) if largest else 0.0
