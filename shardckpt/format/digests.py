"""Digests: xxh3-64 of each block of a shard, xxh3-128 of a text.

Algorithm: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. These find damage;
they are no defence against someone who can write a manifest.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

__all__ = ["BLOCK_BYTES", "block_digest", "digests_from_hex", "digests_to_hex", "text_digest"]

BLOCK_BYTES = 1 << 20
"""A shard is cut into blocks of this size, the last one shorter; each has its digest."""


def block_digest(data: bytes | bytearray | memoryview) -> int:
    """The digest of one block."""
    return xxhash.xxh3_64_intdigest(data)


def digests_to_hex(digests: NDArray[np.uint64]) -> str:
    """16 lower-case hex digits for each digest."""
    return digests.astype(">u8").tobytes().hex()


def digests_from_hex(text: str) -> NDArray[np.uint64]:
    """The digests that digests_to_hex wrote; raises ValueError for anything else."""
    if len(text) % 16 or text != text.lower() or (not text.isalnum() and text):
        raise ValueError("digests are 16 lower-case hex digits each")
    return np.frombuffer(bytes.fromhex(text), dtype=">u8").astype(np.uint64)


def text_digest(data: bytes | bytearray | memoryview) -> str:
    """The digest of a text, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)
