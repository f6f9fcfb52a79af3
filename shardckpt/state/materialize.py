"""Build saved values without a template: containers, values, and tensors that reads fill."""

from __future__ import annotations

import copy
import io
import types
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import TensorEntry
from shardckpt.format.typed_json import Record, TensorRef, UnknownEnum, unknown_enum
from shardckpt.io.tensor_memory import owns_memory, shares_elements
from shardckpt.state.flatten import Ties
from shardckpt.state.local_chunks import PLAIN, LocalChunk, local_chunks
from shardckpt.state.saved_tree import SavedState, below, children, rebuilt
from shardckpt.state.wrapper_tensors import saveable_form

__all__ = ["NOTHING", "Allocate", "Builder", "allocate"]

_MUTABLE = {dict, list, set, bytearray, Counter, deque, io.BytesIO, io.StringIO, np.ndarray}

NOTHING = object()
"""Stands for a value that was not saved."""

Allocate = Callable[[str, str, TensorEntry], tuple[torch.Tensor, bool]]
"""A function that makes a tensor. It takes the name in the state, the name in the manifest and the
saved entry, and returns the tensor and whether reads must fill it.
"""


def allocate(name: str, source: str, entry: TensorEntry) -> tuple[torch.Tensor, bool]:
    """Allocate a CPU tensor for a saved one. See Allocate."""
    return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu"), True


class Builder:
    """Builds the values of saved nodes, and collects the reads that fill their tensors.

    Tied tensors become one tensor.

    Args:
        saved: The saved state.
        reads: The list to which the reads are appended.
        like: Tensors by name. A tensor with the saved shape and dtype is filled; for all others,
            `new` makes a tensor.
        filled: Finds the saved tensor that already fills a memory, so that no memory is filled
            twice.
        new: Makes tensors.
        per_rank: Builds the value of a PerRank. By default it is the list of the values of all
            ranks.

    Attributes:
        built: The names of all leaves that were built.
    """

    def __init__(
        self,
        saved: SavedState,
        reads: list[tuple[TensorEntry, LocalChunk]],
        *,
        like: Mapping[str, torch.Tensor] | None = None,
        filled: Ties | None = None,
        new: Allocate = allocate,
        per_rank: Callable[[TensorRef, str], Any] | None = None,
    ) -> None:
        self.saved = saved
        self.reads = reads
        self.like = like or {}
        self.filled = filled or Ties()
        self.new = new
        self.per_rank = per_rank
        self.built: list[str] = []
        self._tied: dict[TensorRef, Any] = {}

    def build(self, node: Any, name: str) -> Any:
        """Build the value of the saved node at `name`."""
        items = children(node)
        if not items:
            self.built.append(name)
            if isinstance(node, TensorRef):
                return self._leaf(node, name)
            if type(node) is Record:
                return types.SimpleNamespace()
            _check_known(node, name)
            # The caller may change the built value. The decoded node must not change.
            return copy.copy(node) if type(node) in _MUTABLE else node
        for key, _ in items:
            _check_known(key, name)
        values = [(key, self.build(item, below(name, key))) for key, item in items]
        if type(node) is Record:
            return types.SimpleNamespace(**dict(values))
        return rebuilt(node, values)

    def of_all_ranks(self, ref: TensorRef, name: str) -> list[Any]:
        """Build the values of all ranks of a PerRank."""
        ranks = range(self.saved.manifest.world_size)
        return [self.build(self.saved.per_rank(ref, rank=rank), name) for rank in ranks]

    def _leaf(self, ref: TensorRef, name: str) -> Any:
        if ref.ref_type == "per_rank":
            return (self.per_rank or self.of_all_ranks)(ref, name)
        if ref in self._tied:
            return self._tied[ref]
        entry = self.saved.manifest.tensors[ref.name]
        tensor: Any = saveable_form(self.like.get(name), name=name)
        to_read = True
        if (
            tensor is None
            or not isinstance(tensor, torch.Tensor)
            or (type(tensor) in PLAIN and (not owns_memory(tensor) or shares_elements(tensor)))
            or tensor.is_meta
            or tuple(tensor.shape) != entry.shape
            or tensor.dtype != DTYPES[entry.dtype]
        ):
            tensor, to_read = self.new(name, ref.name, entry)
        elif self.filled.first(tensor, ref.name) != ref.name:
            tensor = torch.empty_like(tensor)  # tied in the state, but saved as two tensors
        if to_read:
            self.reads += [(entry, chunk) for chunk in local_chunks(tensor, name=name)]
        self._tied[ref] = tensor.numpy() if ref.ref_type == "numpy" and tensor.is_cpu else tensor
        return self._tied[ref]


def _check_known(value: Any, name: str) -> None:
    """Raise CheckpointError if a value is or contains a member of an enum that the program
    lacks.
    """
    if type(value) in (tuple, set, frozenset, Counter):
        for item in value:
            _check_known(item, name)
    if type(value) is UnknownEnum:
        raise unknown_enum(value, name=name)
