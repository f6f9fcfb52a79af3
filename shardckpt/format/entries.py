"""What a manifest holds, parsed and checked: shards, tensors, and the state that names them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardckpt.format.dtypes import itemsize

__all__ = ["FORMAT_VERSION", "Manifest", "ShardEntry", "TensorEntry"]

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """A shard: its file name, its size, and one xxh3-64 for each block of the file."""

    name: str
    size_bytes: int
    digests: NDArray[np.uint64]


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """A saved tensor. `chunks` [n, 3 + 2 * ndim], int64: number of the shard, begin and end of the
    bytes in its file (header counted), offsets [ndim], sizes [ndim]; row-major data."""

    dtype: str
    shape: tuple[int, ...]
    chunks: NDArray[np.int64]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A manifest. `state` is the typed JSON of the saved state, `per_rank` that of each rank's
    PerRank values (empty if there were none); `notes` are free texts of tools."""

    checkpoint_id: str
    created: str
    library: str
    world_size: int
    shards: tuple[ShardEntry, ...]
    tensors: dict[str, TensorEntry]
    state: Any
    per_rank: tuple[Any, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
