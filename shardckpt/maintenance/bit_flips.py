"""Find which single bit of a block was flipped, from the digest of the block.

To hash again for each of the 8 million bits of a block would take minutes. XXH3 has eight
accumulators that are combined only at the end, in four pairs, and a flipped bit affects one pair.
Each candidate is therefore two numbers, which are carried through the rest of the block, many at a
time. Constants and steps: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, XXH3 for
more than 240 bytes, seed 0, default secret.
"""

from __future__ import annotations

import struct

import numpy as np
import xxhash
from numpy.typing import NDArray

from shardckpt.format.manifest import digest_tail

__all__ = ["find_flipped_bit", "find_flipped_bit_of_text", "repair_manifest"]

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_INITIAL = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)
_MASK = (1 << 64) - 1
_STRETCH = 1024  # bytes between two scrambles: 16 stripes of 64
_GROUP = 8  # stretches whose candidates are processed together: they fit into the cache

_Words = NDArray[np.uint64]


def _words(offset: int) -> _Words:
    return np.frombuffer(_SECRET, "<u8", 8, offset).astype(np.uint64)


_KEYS = np.stack([_words(8 * stripe) for stripe in range(16)])
_SCRAMBLE = _words(128)
_THIRTY_TWO = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


def find_flipped_bit(data: bytes | bytearray | memoryview, digest: int) -> tuple[int, int] | None:
    """Return the (byte, bit) whose flip gives `data` this xxh3-64 digest, or None.

    Takes up to a minute of one processor for a block of 1 MiB, less than a second for 64 KiB.
    """
    block = bytearray(data)
    stretches = max(0, (len(block) - 1) // _STRETCH - 1)
    found = _flip_at_end(block, digest, begin=stretches * _STRETCH)
    if found is None and stretches:
        found = _flip_before(block, digest, stretches)
    return found


def find_flipped_bit_of_text(data: bytes, digest: str) -> tuple[int, int] | None:
    """Return the (byte, bit) whose flip gives `data` this xxh3-128 digest of 32 hex digits, or
    None.

    It hashes the text again for each bit, so it is for short texts.
    """
    before = xxhash.xxh3_128()
    rest = bytearray(data)
    for at, byte in enumerate(data):
        for bit in range(8):
            rest[0] = byte ^ 1 << bit
            state = before.copy()
            state.update(rest)
            if state.hexdigest() == digest:
                return at, bit
        before.update(data[at : at + 1])
        del rest[0]
    return None


def _flip_at_end(block: bytearray, digest: int, *, begin: int) -> tuple[int, int] | None:
    """Try each bit from `begin` on. The last stripe includes some of these bits twice."""
    before = xxhash.xxh3_64(block[:begin])
    tail = block[begin:]
    for at in range(len(tail)):
        for bit in range(8):
            tail[at] ^= 1 << bit
            state = before.copy()
            state.update(tail)
            if state.intdigest() == digest:
                return begin + at, bit
            tail[at] ^= 1 << bit
    return None


def _products(words: _Words, keys: _Words) -> _Words:
    keyed = words ^ keys
    product: _Words = (keyed & _LOW) * (keyed >> _THIRTY_TWO)
    return product


def _scramble(lanes: _Words, keys: _Words) -> None:
    lanes ^= lanes >> np.uint64(47)
    lanes ^= keys
    lanes *= np.uint64(_P32_1)


def _flip_before(block: bytearray, digest: int, stretches: int) -> tuple[int, int] | None:
    """Try each bit of the first `stretches` stretches, then add the rest of the block."""
    total = (len(block) - 1) // _STRETCH
    data = np.frombuffer(block, "<u8", total * 128).reshape(total, 16, 8)
    swapped = [1, 0, 3, 2, 5, 4, 7, 6]
    products = _products(data, _KEYS)
    added = (products + data[:, :, swapped]).sum(axis=1)  # [stretch, lane]
    before = np.empty((total + 1, 8), np.uint64)  # the accumulators before each stretch
    before[0] = _INITIAL
    for number in range(total):
        lanes = before[number] + added[number]
        _scramble(lanes, _SCRAMBLE)
        before[number + 1] = lanes
    last = _last_words(block, total)
    wanted = _unavalanche(digest)
    terms = [_fold(before[total] + last, pair) for pair in range(4)]
    rest = [(wanted - len(block) * _P64_1 - sum(terms) + term) & _MASK for term in terms]
    for pair in range(4):
        for first in range(0, stretches, _GROUP):
            group = range(first, min(first + _GROUP, stretches))
            at = _search(data, products, added, before, last, pair, group, rest[pair])
            if at is not None:
                return at
    return None


def _search(
    data: _Words,
    products: _Words,
    added: _Words,
    before: _Words,
    last: _Words,
    pair: int,
    group: range,
    wanted: int,
) -> tuple[int, int] | None:
    """Flip each bit of the words of one pair of lanes in a group of stretches."""
    even, odd = 2 * pair, 2 * pair + 1
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    lanes = np.empty((2, 0), np.uint64)
    for number in group:
        # [stripe, word of the pair, bit]: the change in the lane of the bit, and in the other lane
        words = data[number][:, even : odd + 1, None]
        flipped = words ^ bits
        changed = _products(flipped, _KEYS[:, even : odd + 1, None])
        changed -= products[number][:, even : odd + 1, None]
        other = flipped - words
        new = np.stack(
            [
                np.concatenate([changed[:, 0].ravel(), other[:, 1].ravel()]),
                np.concatenate([other[:, 0].ravel(), changed[:, 1].ravel()]),
            ]
        )
        new += before[number, even : odd + 1, None]
        lanes = np.concatenate([lanes, new], axis=1)
        lanes += added[number, even : odd + 1, None]
        _scramble(lanes, _SCRAMBLE[even : odd + 1, None])
    for number in range(group.stop, len(added)):
        lanes += added[number, even : odd + 1, None]
        _scramble(lanes, _SCRAMBLE[even : odd + 1, None])
    lanes += last[even : odd + 1, None]
    hits = np.flatnonzero(_fold_lanes(lanes, pair) == np.uint64(wanted))
    if not len(hits):
        return None
    stretch, index = divmod(int(hits[0]), 2048)
    word, rest = divmod(index, 1024)
    stripe, bit = divmod(rest, 64)
    byte = (group.start + stretch) * _STRETCH + stripe * 64 + (even + word) * 8 + bit // 8
    return byte, bit % 8


def _last_words(block: bytearray, total: int) -> _Words:
    """Return the sums after the last scramble: of the full stripes, and of the last 64 bytes."""
    stripes = (len(block) - 1 - total * _STRETCH) // 64
    data = np.frombuffer(block, "<u8", stripes * 8, total * _STRETCH).reshape(stripes, 8)
    end = np.frombuffer(bytes(block[-64:]), "<u8")
    swapped = [1, 0, 3, 2, 5, 4, 7, 6]
    words: _Words = _products(data, _KEYS[:stripes]) + data[:, swapped]
    words = words.sum(axis=0, dtype=np.uint64)
    words += _products(end, _words(121)) + end[swapped]
    return words


def _fold(lanes: _Words, pair: int) -> int:
    a, b = (int(lane) for lane in lanes[2 * pair : 2 * pair + 2])
    first, second = struct.unpack_from("<QQ", _SECRET, 11 + 16 * pair)
    product: int = (a ^ first) * (b ^ second)
    return (product ^ product >> 64) & _MASK


def _fold_lanes(lanes: _Words, pair: int) -> _Words:
    """Apply `_fold` to [2, n] lanes, with 64 x 64 bits from products of halves."""
    first, second = struct.unpack_from("<QQ", _SECRET, 11 + 16 * pair)
    a, b = lanes[0] ^ np.uint64(first), lanes[1] ^ np.uint64(second)
    a_low, a_high, b_low, b_high = a & _LOW, a >> _THIRTY_TWO, b & _LOW, b >> _THIRTY_TWO
    low, cross = a_low * b_low, a_high * b_low
    middle = (low >> _THIRTY_TWO) + (cross & _LOW) + a_low * b_high
    high = a_high * b_high + (cross >> _THIRTY_TWO) + (middle >> _THIRTY_TWO)
    folded: _Words = high ^ ((middle << _THIRTY_TWO) | (low & _LOW))
    return folded


def _unavalanche(digest: int) -> int:
    """Return the sum from which the last step of XXH3 computes the digest."""
    value = digest ^ digest >> 32
    value = value * pow(0x165667919E3779F9, -1, 1 << 64) & _MASK
    return value ^ value >> 37


_LARGEST_MANIFEST_BYTES = 128 << 10


def repair_manifest(data: bytes) -> tuple[bytes, int, int] | None:
    """Repair a single flipped bit of a manifest.

    Returns the repaired manifest, the byte and the bit. None if the digest matches, if more than
    one bit is wrong, or if the manifest has more than 128 KiB, for which the search would take too
    long.
    """
    body, tail = data[: -len(digest_tail(b""))], data[-len(digest_tail(b"")) :]
    if tail == digest_tail(body) or len(data) > _LARGEST_MANIFEST_BYTES:
        return None
    at = find_flipped_bit_of_text(body, tail[11:43].decode("ascii", "replace"))
    right = digest_tail(body)
    if at is None:  # the flipped bit may be in the digest
        flips = [(i, a ^ b) for i, (a, b) in enumerate(zip(tail, right, strict=False)) if a != b]
        if len(tail) != len(right) or len(flips) != 1 or flips[0][1].bit_count() != 1:
            return None
        return body + right, len(body) + flips[0][0], flips[0][1].bit_length() - 1
    repaired = bytearray(body)
    repaired[at[0]] ^= 1 << at[1]
    return bytes(repaired) + tail, *at
