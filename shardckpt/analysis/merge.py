"""Average the tensors of several checkpoints."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from shardckpt.api import Path
from shardckpt.convert.convert import convert_source
from shardckpt.convert.formats import Format
from shardckpt.convert.opening import open_source
from shardckpt.convert.sources import Foreign, LazyTensor, Origin, origin_of, plain_tree
from shardckpt.errors import LoadMismatchError, StateError
from shardckpt.format.dtypes import DTYPES, OPAQUE
from shardckpt.maintenance.rewritable import Source
from shardckpt.reports import ConvertReport
from shardckpt.state.saved_tree import Renaming, Select
from shardckpt.storage.base import Storage
from shardckpt.storage.resolve import resolve

__all__ = ["merge"]


def merge(
    sources: Sequence[Path],
    target: Path,
    *,
    weights: Sequence[float] | None = None,
    to: Format | None = None,
    keys: Select = None,
    rename: Renaming = None,
    shards: int | None = None,
    overwrite: bool = False,
    storage: Storage | None = None,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> ConvertReport:
    """Write a checkpoint with the weighted average of the tensors of others. Not collective.

    Tensors of floating-point and complex dtypes are averaged in float64, and saved with their
    dtype. Other tensors and values come from the first checkpoint; a PerRank value becomes a list
    of the values of all ranks. For "hf", configuration and tokenizer are copied from the first
    checkpoint. Memory: a few buffers for each checkpoint; for the target "torch"
    the full state.

    Args:
        sources: Two or more checkpoints, as `convert` takes them, with the same tensors.
        target: The new checkpoint.
        weights: A weight for each checkpoint; the average divides by their sum. By default all are
            equal.
        to: The format of the target; see `convert`.
        keys: The saved names to merge; see `convert`.
        rename: New names for the entries of all checkpoints; see `load`.
        shards: The number of shards; see `convert`.
        overwrite: Replace a checkpoint at `target`.
        storage: The storage of all; see `save`.
        progress: Called with the bytes written so far.

    Returns:
        The names that were written.

    Raises:
        CheckpointError: A checkpoint can't be read, or is corrupted.
        LoadMismatchError: The checkpoints have different tensors.
        StateError: An argument is invalid.
        StorageError: The file system refused an operation.

    Example:
        >>> import torch, shardckpt
        >>> for step in (1, 3):
        ...     report = shardckpt.save({"w": torch.full((2,), float(step))}, f"run/step-{step}")
        >>> report = shardckpt.merge(["run/step-1", "run/step-3"], "run/average")
        >>> shardckpt.load_state("run/average")["w"]
        tensor([2., 2.])
    """
    shares, location = _shares(sources, weights), resolve(target, storage)
    with ExitStack() as stack:
        opened: list[Source] = []
        for path in sources:
            source = open_source(path, keys=keys, rename=rename, storage=storage)
            stack.callback(source.close)
            opened.append(source)
        return convert_source(
            _merged(opened, shares),
            location,
            to=to,
            shards=shards,
            file_bytes=None,
            overwrite=overwrite,
            progress=progress,
        )


def _shares(sources: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    """Check the arguments, and return the share of each source in the average."""
    if isinstance(sources, str) or not isinstance(sources, Sequence) or len(sources) < 2:
        raise StateError(
            "Too few checkpoints to merge",
            expected="a list of two paths or more",
            actual=repr(sources),
            remedy="pass two paths or more before the target",
        )
    given = [1.0] * len(sources) if weights is None else _numbers(weights)
    total = sum(given)
    if len(given) != len(sources) or not math.isfinite(total) or not total:
        raise StateError(
            "Invalid weights",
            expected=f"{len(sources)} numbers, whose sum is not 0",
            actual=repr(weights),
            remedy="pass a weight for each checkpoint, or leave out weights=",
        )
    return [weight / total for weight in given]


def _numbers(weights: Any) -> list[float]:
    """Return the weights as floats. Returns no weights if one is not a number."""
    try:
        return [] if isinstance(weights, str) else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        return []


def _merged(sources: Sequence[Source], shares: Sequence[float]) -> Foreign:
    first, *others = sources
    tensors = {}
    names = dict.fromkeys(name for source in sources for name in source.manifest.tensors)
    for name in names:
        forms = [_form(source, name) for source in sources]
        for other, form in zip(others, forms[1:], strict=True):
            if form != forms[0]:
                raise LoadMismatchError(
                    "The checkpoints do not have the same tensors",
                    path=other.path,
                    tensor=name,
                    expected=f"{forms[0]}, as in {first.path}",
                    actual=form,
                    remedy="choose the tensors with keys=, or convert a checkpoint to other names",
                )
        entry = first.manifest.tensors[name]
        dtype = DTYPES[entry.dtype]
        read = functools.partial(first.read_box, name)
        if (dtype.is_floating_point or dtype.is_complex) and dtype not in OPAQUE:
            read = functools.partial(_average, sources, shares, name)
        tensors[name] = LazyTensor(dtype, entry.shape, read)
    paths = ", ".join(source.path for source in sources)
    tree = plain_tree(first.manifest, first.manifest.state)
    model = origin_of(first)
    home = model.home or first.path
    origin = Origin(format="a merge", companions=model.companions, home=home)
    return Foreign(paths, "a merge", tree, tensors, identity=(paths, shares), origin=origin)


def _form(source: Source, name: str) -> str:
    """Return what must be equal for an average, as text."""
    entry = source.manifest.tensors.get(name)
    if entry is None:
        return "no such tensor"
    dtype = DTYPES[entry.dtype]
    if dtype in OPAQUE:
        number_type = entry.dtype
    elif dtype.is_complex:
        number_type = "complex"
    else:
        number_type = "floating-point" if dtype.is_floating_point else "integer"
    return f"{number_type} elements of shape {list(entry.shape)}"


def _average(
    sources: Sequence[Source],
    shares: Sequence[float],
    name: str,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> torch.Tensor:
    """Read a box of the average of a tensor."""
    first = sources[0].read_box(name, offsets, sizes)
    wide = torch.complex128 if first.dtype.is_complex else torch.float64
    total = shares[0] * first.to(wide)  # a sum that began with 0.0 would lose the sign of -0.0
    for source, share in zip(sources[1:], shares[1:], strict=True):
        total += share * source.read_box(name, offsets, sizes).to(wide)
    return total.to(first.dtype)
