"""Digests of blocks and texts, and their encoding."""

from __future__ import annotations

import numpy as np
import pytest

from shardckpt.format.digests import block_digest, digests_from_hex, digests_to_hex, text_digest

# The values of the reference implementation of XXH3 with seed 0.
EMPTY_64, EMPTY_128 = 0x2D06800538D394C2, "99aa06d3014798d86001c324468d497f"


def test_the_digests_are_those_of_xxh3_for_every_kind_of_bytes():
    assert block_digest(b"") == EMPTY_64
    assert text_digest(b"") == EMPTY_128
    for kind in (bytes, bytearray, lambda data: memoryview(bytearray(data))):
        assert block_digest(kind(b"abc")) == 0x78AF5F94892F3950
        assert text_digest(kind(b"abc")) == "06b05ab6733a618578af5f94892f3950"


def test_digests_come_back_from_their_text():
    digests = np.array([0, 1, 0xFEDCBA9876543210, (1 << 64) - 1], np.uint64)
    text = digests_to_hex(digests)
    assert text == "0" * 16 + "0" * 15 + "1" + "fedcba9876543210" + "f" * 16
    again = digests_from_hex(text)
    assert again.dtype == np.uint64
    assert again.tolist() == digests.tolist()
    assert digests_from_hex(digests_to_hex(digests[:0])).tolist() == []


@pytest.mark.parametrize(
    "text", ["0" * 15, "0" * 17, "A" * 16, "g" * 16, " " * 16, "0x" + "0" * 14, "-" + "0" * 15]
)
def test_a_text_that_is_not_in_lower_case_hex_is_refused(text):
    with pytest.raises(ValueError):
        digests_from_hex(text)
