"""Lists of integers in JSON text, parsed many at a time by operations on columns."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

__all__ = ["Ints", "NumberText", "parse_lists"]

Ints = NDArray[np.int64]
_Words = NDArray[np.uint64]

_COMMA, _OPEN, _CLOSE = b",[]"
_WORD = 8  # digits that are converted at once
_MOST_DIGITS = 2 * _WORD
_LEAST = np.array([0, 0, *(10**size for size in range(1, _MOST_DIGITS))])
"""The least number of each count of digits."""
_LAST = np.array([0x0F0F0F0F0F0F0F0F >> at << at for at in range(64, -1, -8)], np.uint64)
"""A mask of the values of the last digits of a word, by their count."""
_STEPS = (
    (1 + (10 << 8), 8, 0x00FF00FF00FF00FF),
    (1 + (100 << 16), 16, 0x0000FFFF0000FFFF),
    (1 + (10_000 << 32), 32, 0x00000000FFFFFFFF),
)
"""How neighbouring numbers of 1, 2 and 4 digits become one number: a factor that adds the first,
times a power of ten, to the second; and the shift and mask that keep the sums."""


class NumberText:
    """Text of which numbers are parsed.

    Args:
        text: ASCII text.

    Attributes:
        marks: The positions of all characters that are not digits [m].
        kinds: These characters [m].
    """

    def __init__(self, text: bytes) -> None:
        self._padded = bytes(_MOST_DIGITS) + text
        chars = np.frombuffer(self._padded, np.uint8)[_MOST_DIGITS:]
        self.marks: Ints = np.flatnonzero(chars - np.uint8(ord("0")) > 9)
        self.kinds = chars[self.marks]

    def numbers(self, begins: Ints, ends: Ints) -> Ints | None:
        """Return the numbers whose digits are at begins to ends [n].

        Returns None if a number has leading zeros, no digits, or more than 16 digits.
        """
        sizes = ends - begins
        if ((sizes < 1) | (sizes > _MOST_DIGITS)).any():
            return None
        numbers = self._digits_before(ends, np.minimum(sizes, _WORD))
        long = np.flatnonzero(sizes > _WORD)
        if len(long):
            upper = self._digits_before(ends[long] - _WORD, sizes[long] - _WORD)
            numbers[long] += upper * 10**_WORD
        return None if (numbers < _LEAST[sizes]).any() else numbers

    def _digits_before(self, ends: Ints, sizes: Ints) -> Ints:
        """Return the numbers of `sizes` digits, 1 to 8 each, that end at `ends`.

        Digits are the bytes of a word. Each step joins the neighbouring numbers in it.
        """
        words = as_strided(np.frombuffer(self._padded, "<u8", 1), (len(self._padded) - 7,), (1,))
        word: _Words = words[ends + (_MOST_DIGITS - _WORD)].astype(np.uint64)
        word &= _LAST[sizes]
        for factor, bits, mask in _STEPS:
            word *= np.uint64(factor)
            word >>= np.uint64(bits)
            word &= np.uint64(mask)
        return word.view(np.int64)


def parse_lists(texts: Sequence[msgspec.Raw | bytes]) -> tuple[Ints, Ints] | None:
    """Parse lists of integers.

    Args:
        texts: The JSON text of each list [n]. At least one.

    Returns:
        The length of each list [n], and the numbers of all lists. None if a text is not the
        canonical text of a list of integers of 0 to 16 digits: then a JSON decoder must parse it,
        or refuse it.
    """
    text = NumberText(b",".join(texts))
    marks, kinds = text.marks, text.kinds
    sizes = np.fromiter((len(memoryview(text)) for text in texts), np.int64, len(texts))
    closes = np.cumsum(sizes + 1) - 2
    opens = closes + 1 - sizes
    if not (
        np.array_equal(marks[kinds == _OPEN], opens)
        and np.array_equal(marks[kinds == _CLOSE], closes)
        and np.count_nonzero(kinds == _COMMA) == len(marks) - 2 * len(texts)
    ):
        return None
    # Neighbouring marks enclose a number, nothing in an empty list, and nothing between two lists.
    begins, ends = marks[:-1] + 1, marks[1:]
    filled = begins < ends
    empty = np.count_nonzero(opens + 1 == closes)
    if np.count_nonzero(filled) != len(marks) - 1 - empty - 2 * (len(texts) - 1):
        return None
    begins, ends = begins[filled], ends[filled]
    numbers = text.numbers(begins, ends)
    if numbers is None:
        return None
    return np.diff(np.searchsorted(begins, opens), append=len(begins)), numbers
