"""The safetensors library accepts our headers, and each broken rule is refused."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from shardckpt import errors
from shardckpt.format.safetensors_header import (
    HEADER_ALIGN,
    build_header,
    chunk_name,
    header_bytes,
    parse_chunk_name,
    parse_header,
)

ENTRIES = [("a", "F32", (2, 3), 24), ("b[0:1]", "I8", (1,), 1), ("e", "F16", (0, 4), 0)]


def test_header_and_parser_agree(tmp_path):
    header = build_header(ENTRIES, {"format": "shardckpt"})
    assert len(header) % HEADER_ALIGN == 0
    assert header_bytes(header[:8], file_size_bytes=len(header) + 25, path="p") == len(header)
    tensors, metadata = parse_header(header, file_size_bytes=len(header) + 25, path="p")
    # An empty tensor has no place of its own: sorted by offsets it may come before its neighbour.
    assert {(t.name, t.dtype, t.shape, t.end - t.begin) for t in tensors} == set(ENTRIES)
    assert metadata == {"format": "shardckpt"}
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(25))
    with safetensors.safe_open(path, "pt") as shard:
        assert set(shard.keys()) == {"a", "b[0:1]", "e"}
        assert shard.get_tensor("a").shape == (2, 3)


@given(
    st.text(),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=4),
)
def test_chunk_names_can_be_read(name, box):
    offsets, sizes = tuple(a for a, _ in box), tuple(b for _, b in box)
    shape = tuple(a + b + 1 for a, b in box)
    text = chunk_name(name, shape, offsets, sizes)
    if box:
        assert parse_chunk_name(text) == (name, (offsets, sizes))
    assert chunk_name(name, sizes, offsets, sizes) == name or name == "__metadata__"


def test_names_that_look_like_other_things():
    assert chunk_name("__metadata__", (2,), (0,), (2,)) == "__metadata__[0:2]"
    assert parse_chunk_name("__metadata__[]") == ("__metadata__", ((), ()))
    assert parse_chunk_name("a[0]") == ("a[0]", None)


def broken(change):
    """A header with the given change, and the size of its file."""
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(change(header) or header)
    return struct.pack("<Q", len(text)) + text.encode(), len(text) + 16


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["a"].update(dtype="F33"),
        lambda h: h["a"].update(shape=[-2]),
        lambda h: h["a"].update(shape=[1] * 65 + [2]),
        lambda h: h["a"].update(shape=[2**62, 2**62]),
        lambda h: h["a"].update(data_offsets=[4, 12]),
        lambda h: h["a"].update(data_offsets=[8, 0]),
        lambda h: h["a"].update(data_offsets=[0, 4]),
        lambda h: h["a"].update(more=1),
        lambda h: h["a"].pop("shape"),
        lambda h: h.update(b={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),
        lambda h: h.update(b={"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}),
        lambda h: h.update(__metadata__={"x": 1}),
        lambda h: h.update(__metadata__=[]),
        lambda h: h.pop("a"),
        lambda h: [h],
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(change):
    data, size = broken(change)
    with pytest.raises(errors.CorruptionError) as caught:
        parse_header(data, file_size_bytes=size, path="where")
    assert caught.value.path == "where"


def test_the_unbroken_one_passes():
    data, size = broken(lambda header: None)
    assert parse_header(data, file_size_bytes=size, path="p")[0][0].name == "a"


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63, 2**64 - 1])
def test_lengths_that_lie(length):
    with pytest.raises(errors.CorruptionError):
        header_bytes(struct.pack("<Q", length), file_size_bytes=100, path="p")


def test_a_key_that_stands_twice():
    entry = '"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
    text = f"{{{entry},{entry}}}".encode()
    with pytest.raises(errors.CorruptionError, match="violates the safetensors"):
        parse_header(struct.pack("<Q", len(text)) + text, file_size_bytes=8 + len(text), path="p")


def test_nesting_that_would_exhaust_the_stack():
    text = b'{"a":' + b"[" * 100_000
    with pytest.raises(errors.CorruptionError):
        parse_header(struct.pack("<Q", len(text)) + text, file_size_bytes=8 + len(text), path="p")
