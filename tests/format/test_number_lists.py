"""Lists of integers that are parsed as columns are those that a JSON decoder finds."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.format.number_lists import parse_lists

NUMBERS = st.integers(0, 10**16 - 1) | st.integers(0, 120)
CHARACTERS = st.text(alphabet="0123456789,,,[]- .eE", max_size=24)


def encoded(lists):
    return [msgspec.json.encode(numbers) for numbers in lists]


def parsed(texts):
    found = parse_lists(texts)
    if found is None:
        return None
    counts, numbers = found
    ends = itertools.accumulate(counts.tolist(), initial=0)
    return [numbers[low:high].tolist() for low, high in itertools.pairwise(ends)]


@given(st.lists(st.lists(NUMBERS, max_size=9), min_size=1, max_size=9))
def test_there_and_back(lists):
    assert parsed(encoded(lists)) == lists


@pytest.mark.parametrize("digits", range(1, 17))
def test_each_count_of_digits(digits):
    lists = [[10 ** (digits - 1), 10**digits - 1], [int("1234567890123456"[:digits])]]
    assert parsed(encoded(lists)) == lists


@given(st.lists(CHARACTERS.map(lambda text: f"[{text}]".encode()) | CHARACTERS.map(str.encode)))
def test_no_other_text_is_taken_for_lists(texts):
    if texts and (lists := parsed(texts)) is not None:
        assert encoded(lists) == texts


OTHER_TEXTS = (
    *("[01]", "[00]", "[-1]", "[-0]", "[1,]", "[,1]", "[1,,2]", "[1 ]", "[1.0]", "[1e2]"),
    *("[[1]]", "[1],[2]", "1", "", "[1", "1]", "[null]", '["1"]', "[12345678901234567]"),
)


@pytest.mark.parametrize("text", OTHER_TEXTS)
def test_what_a_decoder_must_parse_or_refuse(text):
    for texts in ([text], ["[1]", text], [text, "[]"]):
        assert parsed([text.encode() for text in texts]) is None
