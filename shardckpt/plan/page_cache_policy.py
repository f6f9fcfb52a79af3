"""Which ranks read what other ranks of their machine read, and so leave it to the page cache."""

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
"""Neighbouring blocks are read past the page cache by whoever wants at least this part of them."""


class Share(msgspec.Struct, array_like=True, frozen=True):
    """What a rank reads: `wanted_bytes` of tensors of `whole_bytes`, which `tensors` stands for."""

    machine: str
    tensors: int
    wanted_bytes: int
    whole_bytes: int


def share_of(reads: Sequence[tuple[TensorEntry, LocalChunk]], machine: str) -> Share:
    """The share of a rank with these reads. Pure."""
    return Share(
        machine,
        xxhash.xxh3_64_intdigest(b"".join(entry.chunks.data for entry, _ in reads)),
        sum(chunk.data.nbytes for _, chunk in reads),
        sum(entry.size_bytes for entry, _ in reads),
    )


def past_cache(shares: Sequence[Share]) -> list[float]:
    """For each rank what it reads past the page cache: ALWAYS where no other rank of its machine
    reads of the same tensors; NEVER where they want, together, much more than these tensors are;
    else MOSTLY, as what a rank does not want of a block is what another one wants of it."""
    wanted: dict[tuple[str, int], list[int]] = defaultdict(list)
    for share in shares:
        wanted[share.machine, share.tensors].append(share.wanted_bytes)

    def of(share: Share) -> float:
        together = wanted[share.machine, share.tensors]
        if len(together) == 1:
            return ALWAYS
        return MOSTLY if sum(together) <= share.whole_bytes + share.whole_bytes // 4 else NEVER

    return [of(share) for share in shares]
