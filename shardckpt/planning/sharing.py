"""Which ranks read bytes that no other rank of their machine reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np
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
    first = [entry.chunks[0, :2] for entry, _ in reads if len(entry.chunks)]
    return Share(
        machine,
        xxhash.xxh3_64_intdigest(np.concatenate(first).tobytes() if first else b""),
        sum(chunk.data.numel() * chunk.data.element_size() for _, chunk in reads),
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
