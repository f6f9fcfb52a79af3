"""The entries of a source by name: tensors, and other values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from shardckpt.convert.sources import plain_tree
from shardckpt.format.dtype_names import itemsize
from shardckpt.format.typed_json import TensorRef
from shardckpt.io.buffers import BUFFER_BYTES
from shardckpt.maintenance.rewritable import Source, cut_box
from shardckpt.state.saved_tree import Renaming, SavedState, Select, enums_as_text

__all__ = ["pieces", "saved_entries", "tensors_of", "values_of"]


def saved_entries(
    source: Source, *, keys: Select = None, rename: Renaming = None, check: bool = True
) -> SavedState:
    """Return the saved entries by name. A PerRank is a list of the values of all ranks.

    Enums are text, as their classes need not be imported.

    Raises:
        LoadMismatchError: `check`, and `keys` or `rename` has a name that no saved entry has.
    """
    manifest = source.manifest
    state = enums_as_text(plain_tree(manifest, manifest.state))
    plain = dataclasses.replace(manifest, state=state, per_rank=())
    saved = SavedState(plain, keys=keys, rename=rename)
    return saved.check_used(path=source.path) if check else saved


def tensors_of(saved: SavedState) -> dict[str, str]:
    """Map the name of each tensor to its name in the manifest, which is another one if the tensor
    is tied.
    """
    leaves = saved.leaves.items()
    return {name: node.name for name, node in leaves if isinstance(node, TensorRef)}


def values_of(saved: SavedState) -> dict[str, Any]:
    """Return each value that is not a tensor."""
    leaves = saved.leaves.items()
    return {name: node for name, node in leaves if not isinstance(node, TensorRef)}


def pieces(
    source: Source, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide a box of a tensor into boxes of at most a buffer, as (offsets, sizes)."""
    if math.prod(sizes):
        dtype = source.manifest.tensors[name].dtype
        yield from cut_box(offsets, sizes, BUFFER_BYTES // itemsize(dtype))
