"""The policy for reads past the page cache: blocks that no other rank of the machine reads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import xxhash

from shardckpt.format.entries import TensorEntry
from shardckpt.state.local_chunks import LocalChunk

__all__ = ["ALWAYS", "MOSTLY", "NEVER", "ReadSummary", "past_cache", "summarize_reads"]

ALWAYS, MOSTLY, NEVER = 0.0, 0.8, math.inf
"""The least fraction of neighbouring blocks that a rank must need to read past the page cache."""


class ReadSummary(msgspec.Struct, array_like=True, frozen=True):
    """A summary of the reads of a rank.

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


def summarize_reads(reads: Sequence[tuple[TensorEntry, LocalChunk]], machine: str) -> ReadSummary:
    """Return the summary of a rank's reads. Pure."""
    entries = {id(entry): entry for entry, _ in reads}.values()  # a tensor may have many chunks
    return ReadSummary(
        machine,
        xxhash.xxh3_64_intdigest(b"".join(entry.identity() for entry in entries)),
        sum(chunk.data.nbytes for _, chunk in reads),
        sum(entry.size_bytes for entry in entries),
    )


def past_cache(summaries: Sequence[ReadSummary]) -> list[float]:
    """Return, for each rank, the fraction of a block that it must need to read past the page cache.

    The result is ALWAYS if no other rank of the machine reads the same tensors. It is NEVER if
    these ranks together need much more than the bytes of the tensors, as they then read the same
    boxes. Otherwise it is MOSTLY, as another rank needs the rest of a block.
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
