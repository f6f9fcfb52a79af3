"""Choose which reads bypass the page cache: those of data that one rank of a machine reads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import xxhash

from shardckpt.format.entries import TensorEntry
from shardckpt.state.local_chunks import LocalChunk

__all__ = ["ALWAYS", "MOSTLY", "NEVER", "ReadSummary", "past_cache", "summarise_reads"]

ALWAYS, MOSTLY, NEVER = 0.0, 0.8, math.inf
"""A rank reads neighbouring blocks past the page cache if it wants at least this part of them."""


class ReadSummary(msgspec.Struct, array_like=True, frozen=True):
    """The reads of a rank in short.

    Attributes:
        machine: The name of its machine.
        tensors: A digest of the tensors that it reads from.
        wanted_bytes: The bytes that it reads.
        tensor_bytes: The bytes of these tensors.
    """

    machine: str
    tensors: int
    wanted_bytes: int
    tensor_bytes: int


def summarise_reads(reads: Sequence[tuple[TensorEntry, LocalChunk]], machine: str) -> ReadSummary:
    """Return the summary of a rank's reads. Pure."""
    return ReadSummary(
        machine,
        xxhash.xxh3_64_intdigest(b"".join(entry.chunks.data for entry, _ in reads)),
        sum(chunk.data.nbytes for _, chunk in reads),
        sum(entry.size_bytes for entry, _ in reads),
    )


def past_cache(summaries: Sequence[ReadSummary]) -> list[float]:
    """For each rank, the part of a block that it must want to read it past the page cache.

    ALWAYS if no other rank of its machine reads the same tensors. NEVER if these ranks together
    want much more than the bytes of the tensors: they read the same boxes. Otherwise MOSTLY: the
    rest of a block is wanted by another rank.
    """
    wanted: dict[tuple[str, int], list[int]] = defaultdict(list)
    for rank in summaries:
        wanted[rank.machine, rank.tensors].append(rank.wanted_bytes)

    def least_part(rank: ReadSummary) -> float:
        wanted_bytes = wanted[rank.machine, rank.tensors]
        if len(wanted_bytes) == 1:
            return ALWAYS
        return MOSTLY if sum(wanted_bytes) <= rank.tensor_bytes * 5 // 4 else NEVER

    return [least_part(rank) for rank in summaries]
