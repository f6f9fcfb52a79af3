"""Manifests survive encoding; a broken rule is refused, even with a valid digest."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt import errors
from shardckpt.format import typed_json as values
from shardckpt.format.digests import text_digest
from shardckpt.format.entries import Manifest, ShardEntry, TensorEntry
from shardckpt.format.manifest import encode_tensors, from_bytes, to_bytes

SHARD = "shard-00000-of-00001.safetensors"


def a_manifest(**changes):
    facts = {
        "checkpoint_id": "0" * 32,
        "created": "2026-01-01T00:00:00+00:00",
        "library": "shardckpt test",
        "world_size": 2,
        "shards": (ShardEntry(name=SHARD, size_bytes=5000, digests=np.array([7], np.uint64)),),
        "tensors": {
            "w": TensorEntry(
                dtype="F32",
                shape=(4, 2),
                chunks=np.array(
                    [[0, 4096, 4112, 0, 0, 2, 2], [0, 4112, 4128, 2, 0, 2, 2]], np.int64
                ),
            ),
            "s": TensorEntry(dtype="I8", shape=(), chunks=np.array([[0, 4128, 4129]], np.int64)),
            "e": TensorEntry(dtype="F16", shape=(0, 3), chunks=np.empty((0, 7), np.int64)),
        },
        "state": {"w": {"$tensor": "w"}, "s": [{"$tensor": "s"}], "r": {"$per_rank": "0"}},
        "per_rank": ([1], [2]),
        "notes": {"tool": "text"},
    }
    return Manifest(**{**facts, **changes})


def test_there_and_back():
    manifest = a_manifest()
    again = from_bytes(to_bytes(manifest), path="p")
    assert to_bytes(again) == to_bytes(manifest)
    assert again.tensors["w"].chunks.tolist() == manifest.tensors["w"].chunks.tolist()
    assert again.tensors["e"].size_bytes == 0
    assert list(again.tensors) == ["w", "s", "e"]
    assert again.per_rank == ([1], [2])


@given(st.dictionaries(st.text(), st.lists(st.integers(0, 9), max_size=3), max_size=5))
def test_any_names_and_shapes(shapes):
    at, tensors = 4096, {}
    for name, shape in shapes.items():
        size = int(np.prod(shape)) if shape else 1
        row = [[0, at, at + size, *[0] * len(shape), *shape]]
        tensors[name] = TensorEntry(dtype="U8", shape=tuple(shape), chunks=np.array(row, np.int64))
        at += size
    shards = (ShardEntry(name=SHARD, size_bytes=at, digests=np.array([1], np.uint64)),)
    manifest = a_manifest(shards=shards, tensors=tensors, state={"a": 1}, per_rank=())
    assert to_bytes(from_bytes(to_bytes(manifest), path="p")) == to_bytes(manifest)


@pytest.mark.parametrize("dims", [0, 1, 3])
@pytest.mark.parametrize("lengths", [[200], [64, 64], [100, 1, 100, 1, 100], [1] * 70, [63], []])
def test_long_lists_are_encoded_as_short_ones(lengths, dims):
    """Runs of chunks at the same bytes of their shards are encoded once for several tensors."""
    tensors = {}
    for index, step in enumerate((10, 10, 1000)):
        begin = np.repeat(np.arange(len(lengths)) * step, lengths)
        shard = np.arange(len(begin)) * (index // 2 + 1)
        boxes = np.arange(2 * dims * len(begin)).reshape(len(begin), 2 * dims)
        chunks = np.column_stack([shard, begin, begin + 7, boxes])
        tensors[f"t{index}"] = TensorEntry(dtype="F32", shape=(1,) * dims, chunks=chunks)
    plain = {
        name: {"dtype": "F32", "shape": entry.shape, "chunks": entry.chunks.ravel().tolist()}
        for name, entry in tensors.items()
    }
    assert encode_tensors(tensors.items()) == msgspec.json.encode(plain)


def sealed(document) -> bytes:
    """JSON with a digest that fits: what someone who knows the format could write."""
    document = {key: value for key, value in document.items() if key != "digest"}
    body = json.dumps(document, separators=(",", ":"), ensure_ascii=False)[:-1].encode()
    return body + f',"digest":"{text_digest(body)}"}}\n'.encode()


def document():
    return json.loads(to_bytes(a_manifest()))


def test_sealing_is_what_the_library_does():
    assert sealed(document()) == to_bytes(a_manifest())


def tensor(**facts):
    return lambda d: d["tensors"]["w"].update(facts)


def chunks(row, *rows):
    return tensor(chunks=[*row, *[n for more in rows for n in more]])


FIRST, SECOND = [0, 4096, 4112, 0, 0, 2, 2], [0, 4112, 4128, 2, 0, 2, 2]
HOSTILE = {
    "shard outside": lambda d: d["shards"][0].update(name="../" + SHARD),
    "shard absolute": lambda d: d["shards"][0].update(name="/etc/passwd"),
    "shard of another kind": lambda d: d["shards"][0].update(name="manifest.json"),
    "shard twice": lambda d: d["shards"].append(d["shards"][0]),
    "shard with a nul": lambda d: d["shards"][0].update(name=SHARD[:-1] + "\0"),
    "negative size": lambda d: d["shards"][0].update(size=-5000),
    "size beyond digests": lambda d: d["shards"][0].update(size=1 << 40),
    "digests cut": lambda d: d["shards"][0].update(digests="07"),
    "digests in capitals": lambda d: d["shards"][0].update(digests="A" * 16),
    "digests not hex": lambda d: d["shards"][0].update(digests="g" * 16),
    "unknown dtype": tensor(dtype="F33"),
    "negative shape": tensor(shape=[-4, 2]),
    "huge shape": tensor(shape=[1 << 40, 1 << 40]),
    "many dimensions": tensor(shape=[1] * 65, chunks=[]),
    "number of chunks": tensor(chunks=[0, 1]),
    "number beyond 64 bits": chunks(FIRST, [0, 4112, 1 << 70, 2, 0, 2, 2]),
    "shard number": chunks(FIRST, [1, *SECOND[1:]]),
    "shard number negative": chunks(FIRST, [-1, *SECOND[1:]]),
    "bytes beyond": chunks(FIRST, [0, 4996, 5012, 2, 0, 2, 2]),
    "bytes in the length": chunks(FIRST, [0, 4, 20, 2, 0, 2, 2]),
    "bytes backwards": chunks(FIRST, [0, 4128, 4112, 2, 0, 2, 2]),
    "bytes unaligned": chunks(FIRST, [0, 4113, 4129, 2, 0, 2, 2]),
    "bytes shared": chunks(FIRST, [0, 4104, 4120, 2, 0, 2, 2]),
    "bytes too few": chunks(FIRST, [0, 4112, 4120, 2, 0, 2, 2]),
    "a hole": chunks(FIRST),
    "an overlap": chunks(FIRST, [0, 4112, 4128, 1, 0, 2, 2]),
    "out of bounds": chunks(FIRST, [0, 4112, 4128, 3, 0, 2, 2]),
    "offsets that wrap": chunks(FIRST, [0, 4112, 4128, 2**63 - 1, 0, 2, 2]),
    "sizes that wrap": chunks(FIRST, [0, 4112, 4128, 2, 0, 2**62, 2]),
    "world size": lambda d: d.update(world_size=0),
    "ranks": lambda d: d.update(per_rank=[[1]]),
    "per_rank of no rank": lambda d: d.update(per_rank=[]),
    "per_rank beyond": lambda d: d.update(state={"$per_rank": "5"}),
    "per_rank odd": lambda d: d.update(state={"$per_rank": "-1"}),
    "dangling tensor": lambda d: d.update(state={"x": {"$tensor": "nothing"}}),
    "dangling array": lambda d: d.update(state={"x": [{"$ndarray": "nothing"}]}),
    "a reference that is no name": lambda d: d.update(state={"$tensor": ["w"]}),
    "an unknown member": lambda d: d.update(more=1),
    "a missing member": lambda d: d.pop("notes"),
    "members of a wrong type": lambda d: d.update(tensors=[]),
    "another order": lambda d: d.update(version=d.pop("version")),
    "version 0": lambda d: d.update(version=0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_are_refused(name):
    changed = document()
    HOSTILE[name](changed)
    with pytest.raises(errors.CorruptionError) as caught:
        from_bytes(sealed(changed), path="where")
    assert caught.value.path == "where"
    assert caught.value.remedy


def test_a_float_where_an_int_belongs():
    text = to_bytes(a_manifest()).replace(b'"version":1,', b'"version":1.0,')
    body = text[: text.rindex(b',"digest"')]
    with pytest.raises(errors.CorruptionError):
        from_bytes(body + f',"digest":"{text_digest(body)}"}}\n'.encode(), path="p")


def test_white_space_and_repeated_keys():
    text = to_bytes(a_manifest())
    body = text[: text.rindex(b',"digest"')]
    for other in (
        body.replace(b'"version":1', b'"version": 1'),
        body.replace(b'"notes":{', b'"notes":{"tool":"text",'),
        body.replace(b"shardckpt test", b"shardckpt \\u0074est"),
    ):
        assert other != body
        with pytest.raises(errors.CorruptionError, match="violates the format"):
            from_bytes(other + f',"digest":"{text_digest(other)}"}}\n'.encode(), path="p")


def test_every_bit_of_a_manifest():
    whole = to_bytes(a_manifest())
    for at in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            with pytest.raises(errors.CheckpointError):
                from_bytes(bytes(changed), path="p")


def test_every_cut_of_a_manifest():
    whole = to_bytes(a_manifest())
    for end in range(len(whole)):
        with pytest.raises(errors.CheckpointError):
            from_bytes(whole[:end], path="p")


def nested(levels):
    node = 1
    for _ in range(levels):
        node = [node]
    return node


def test_nesting_up_to_the_limit():
    manifest = from_bytes(to_bytes(a_manifest(state=nested(300))), path="p")
    values.decode(manifest.state, tensor=lambda ref: ref)
    with pytest.raises(errors.CorruptionError, match="300 levels"):
        from_bytes(to_bytes(a_manifest(state=nested(301))), path="p")


def test_nesting_that_would_exhaust_the_stack():
    body = to_bytes(a_manifest())
    body = body[: body.rindex(b',"digest"')].replace(b'{"tool":"text"}', b"[" * 100_000)
    with pytest.raises(errors.CorruptionError):
        from_bytes(body + f',"digest":"{text_digest(body)}"}}\n'.encode(), path="p")
