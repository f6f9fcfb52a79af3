"""The parsed manifest: its shards, its tensors and the tree of the state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardckpt.format.dtype_names import itemsize

__all__ = ["FORMAT_VERSION", "Box", "CheckedPart", "Manifest", "ShardEntry", "TensorEntry"]

FORMAT_VERSION = 1

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The offsets and the sizes of a part of a tensor, in elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """A shard in the manifest.

    Attributes:
        name: The file name.
        size_bytes: The size of the file.
        digests: The xxh3-64 digest of each block of the file.
    """

    name: str
    size_bytes: int
    digests: NDArray[np.uint64]


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """A tensor in the manifest.

    Attributes:
        dtype: The name of the dtype; see `format.dtypes`.
        shape: The global shape.
        chunks: One row for each chunk [n, 3 + 2 * ndim]: the number of the shard, the begin and end
            of the chunk in the file in bytes, its offsets [ndim] and its sizes [ndim]. The data of
            a chunk are row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: NDArray[np.int64]

    @property
    def size_bytes(self) -> int:
        """The bytes of the full tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)

    def identity(self) -> bytes | memoryview:
        """Return bytes that differ from those of the other tensors of the checkpoint."""
        return self.chunks.data


class CheckedPart(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The part of a manifest that one rank has checked.

    Attributes:
        digest: The digest of the manifest.
        ranges: The bytes of the chunks: (shard, begin, end) of each range [n, 3].
    """

    digest: str
    ranges: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A parsed manifest.

    Attributes:
        checkpoint_id: 32 hexadecimal digits.
        created: The time of the save, in ISO 8601.
        library: The name and version of the library that saved.
        world_size: The number of ranks that saved.
        shards: The shards, in the order of their numbers.
        tensors: The tensors by name.
        state: The tree of the saved state, as typed JSON.
        per_rank: The PerRank values of each rank, as typed JSON. Empty for a state without PerRank.
        notes: Texts of tools, by title.
        format_version: The version of the format.
        part: The part of the chunks that this rank has checked, if several ranks check the
            manifest. None if this rank has checked all of them.
    """

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
    part: CheckedPart | None = None
