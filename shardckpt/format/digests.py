"""Digests: xxh3-64 of each block of a shard, xxh3-128 of a text.

Algorithm: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. The digests
detect corruption. They do not protect against an attacker who can write a manifest.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

__all__ = ["BLOCK_BYTES", "block_digest", "digests_from_hex", "digests_to_hex", "text_digest"]

BLOCK_BYTES = 1 << 20
"""The size of a block. The last block of a shard may be shorter. Each block has a digest."""


def block_digest(data: bytes | bytearray | memoryview) -> int:
    """Return the digest of a block."""
    return xxhash.xxh3_64_intdigest(data)


def digests_to_hex(digests: NDArray[np.uint64]) -> str:
    """Encode digests with 16 lower-case hex digits each."""
    return digests.astype(">u8").tobytes().hex()


def digests_from_hex(text: str) -> NDArray[np.uint64]:
    """Decode the text of digests_to_hex. Raises ValueError for any other text."""
    if len(text) % 16 or text != text.lower() or (not text.isalnum() and text):
        raise ValueError("digests of 16 lower-case hex digits each")
    return np.frombuffer(bytes.fromhex(text), dtype=">u8").astype(np.uint64)


def text_digest(*parts: bytes | memoryview) -> str:
    """Return the digest of a text, 32 hex digits. The text may be given in parts."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
