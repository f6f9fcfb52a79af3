"""Choose which reads bypass the page cache: those of data that one rank of a machine reads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import xxhash

from shardckpt.format.entries import TensorEntry
from shardckpt.state.local_chunks import LocalChunk

__all__ = ["ALWAYS", "MOSTLY", "NEVER", "Share", "past_cache", "share_of"]

ALWAYS, MOSTLY, NEVER = 0.0, 0.8, math.inf
"""A block between two ranks bypasses the cache for the rank that wants at least this fraction of
it."""


class Share(msgspec.Struct, array_like=True, frozen=True):
    """The reads of a rank: `wanted_bytes` of tensors with `whole_bytes` in all. `tensors`
    identifies the tensors."""

    machine: str
    tensors: int
    wanted_bytes: int
    whole_bytes: int


def share_of(reads: Sequence[tuple[TensorEntry, LocalChunk]], machine: str) -> Share:
    """Summarise the reads of a rank. Pure."""
    return Share(
        machine,
        xxhash.xxh3_64_intdigest(b"".join(entry.chunks.data for entry, _ in reads)),
        sum(chunk.data.nbytes for _, chunk in reads),
        sum(entry.size_bytes for entry, _ in reads),
    )


def past_cache(shares: Sequence[Share]) -> list[float]:
    """For each rank, whether its reads bypass the page cache.

    ALWAYS if no other rank of its machine reads the same tensors; NEVER if the ranks together read
    much more than the size of these tensors; otherwise MOSTLY, since the rest of a block is then
    read by another rank.
    """
    wanted: dict[tuple[str, int], list[int]] = defaultdict(list)
    for share in shares:
        wanted[share.machine, share.tensors].append(share.wanted_bytes)

    def of(share: Share) -> float:
        together = wanted[share.machine, share.tensors]
        if len(together) == 1:
            return ALWAYS
        return MOSTLY if sum(together) <= share.whole_bytes + share.whole_bytes // 4 else NEVER

    return [of(share) for share in shares]
