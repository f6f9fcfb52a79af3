"""Which ranks read bytes that no other rank of their machine reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import xxhash

from shardckpt.format.manifest import TensorEntry
from shardckpt.planning.chunks import LocalChunk

__all__ = ["Share", "alone", "share_of"]


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


def alone(shares: Sequence[Share]) -> list[bool]:
    """Whether each rank reads by and large what no other rank of its machine does: those there
    that read of the same tensors want, together, hardly more than these tensors are."""
    wanted: dict[tuple[str, int], int] = defaultdict(int)
    for share in shares:
        wanted[share.machine, share.tensors] += share.wanted_bytes
    return [
        wanted[share.machine, share.tensors] <= share.whole_bytes + share.whole_bytes // 4
        for share in shares
    ]
