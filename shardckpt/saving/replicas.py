"""Digests of the chunks that several ranks hold. Rank 0 compares them."""

from __future__ import annotations

import numpy as np
import torch
import xxhash

from shardckpt.io.buffers import view_at
from shardckpt.io.tensor_memory import contiguous_pieces
from shardckpt.plan.local_plan import LocalPlan
from shardckpt.plan.save_plan import RankWrites

__all__ = ["replica_digests"]

COMPARED_BYTES = 64 << 10
"""Replicas up to this size are always compared. Larger ones are compared on request."""


def replica_digests(
    local: LocalPlan, writes: RankWrites, *, everything: bool, sampled: bool = False
) -> bytes:
    """Return a digest for each local chunk that other ranks hold too; 0 if it is not compared.

    Args:
        local: This rank's plan.
        writes: This rank's part of the global plan.
        everything: Compare chunks of any size, instead of only those up to COMPARED_BYTES.
        sampled: Compare large chunks by their first COMPARED_BYTES.
    """
    digests = np.zeros(len(writes.compare), dtype="<u8")
    for index, row in enumerate(writes.compare.tolist()):
        data = local.data[row]
        size = data.numel() * data.element_size()
        if sampled and not everything and size > COMPARED_BYTES:
            data, size = _beginning(data), COMPARED_BYTES
        if size and (everything or size <= COMPARED_BYTES):
            digest = xxhash.xxh3_64()
            for piece in contiguous_pieces(data.detach()):
                digest.update(view_at(piece.data_ptr(), piece.numel() * piece.element_size()))
            digests[index] = digest.intdigest() | 1
    return digests.tobytes()


def _beginning(data: torch.Tensor) -> torch.Tensor:
    """Return the first elements of a large tensor, up to COMPARED_BYTES."""
    while (size := data.numel() * data.element_size()) > COMPARED_BYTES:
        rows = len(data) * COMPARED_BYTES // size
        data = data[:rows] if rows else data[0]
    return data
