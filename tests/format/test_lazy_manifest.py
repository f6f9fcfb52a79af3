"""A manifest that is parsed in part describes tensors as the full one does, or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt import errors
from shardckpt.format import lazy_manifest
from shardckpt.format import typed_json as values
from shardckpt.format.entries import ShardEntry, TensorEntry
from shardckpt.format.lazy_manifest import LazyManifest
from shardckpt.format.manifest import from_bytes, to_bytes
from shardckpt.format.typed_json import TensorRef
from shardckpt.state.saved_tree import SavedState
from tests.format.test_divided_manifest import chunks_in
from tests.format.test_manifest import SHARD, a_manifest, document, sealed

NAMES = st.text(alphabet="ab.$", max_size=4)
REFERENCES = st.sampled_from(
    [TensorRef(*facts.split()) for facts in ("w tensor", "s tensor", "e numpy", "0 per_rank")]
)
STATES = st.dictionaries(
    NAMES,
    st.recursive(
        REFERENCES | st.integers(0, 9) | NAMES,
        lambda inner: (
            st.dictionaries(NAMES | st.integers(0, 1), inner, max_size=3)
            | st.lists(inner, max_size=2)
            | st.tuples(inner)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def both(**changes):
    data = to_bytes(a_manifest(**changes))
    return LazyManifest(data, path="p"), from_bytes(data, path="p")


@given(STATES, st.lists(NAMES, max_size=3))
def test_names_lead_where_they_lead_in_the_complete_manifest(state, names):
    outline, manifest = both(state=values.encode(state, at=""))
    leaves = SavedState(manifest).leaves
    for name in [*leaves, *names]:
        found, leaf = outline.find(name), leaves.get(name)
        assert found is None or (leaf.name, leaf.ref_type != "per_rank") == (found, True), name


@pytest.mark.parametrize("name", ["w", "m.layer.0.weight", "m.layer.0.a.b", "array"])
def test_plain_names_are_found(name):
    ref = TensorRef("w", "tensor")
    inner = {"layer.0": {"weight": ref, "a.b": ref}}
    state = {"w": ref, "m": inner, "array": TensorRef("w", "numpy")}
    outline, _ = both(state=values.encode(state, at=""))
    assert outline.find(name) == "w"
    assert outline.find(f"{name}.") is outline.find(f"{name}.x") is outline.find("m") is None


@pytest.mark.parametrize("state", [{"": {"a.b": 1}}, {"a": {"b": 1}}, {"a": {"": {"b": 1}}}])
def test_a_name_that_two_ways_lead_to_is_not_found(state):
    for both_ways in ({**state, "a.b": 2}, {"a.b": 2, **state}):
        outline, manifest = both(state=values.encode(reference(both_ways), at=""))
        found = SavedState(manifest).leaves
        assert outline.find("a.b") in (None, found["a.b"].name), both_ways


def reference(node):
    if isinstance(node, dict):
        return {key: reference(item) for key, item in node.items()}
    return TensorRef({1: "w", 2: "s"}[node], "tensor")


@pytest.fixture
def every_object_is_large(monkeypatch):
    monkeypatch.setattr(lazy_manifest, "LARGE_OBJECT_BYTES", 0)
    monkeypatch.setattr(lazy_manifest, "_MANY", 0)


@given(STATES, st.lists(NAMES, max_size=9))
def test_a_search_finds_what_decoding_finds(state, names):
    """With an early name that needs no search, so that the searches are not used up."""
    data = to_bytes(a_manifest(state=values.encode(state, at="")))
    for name in [*names, *SavedState(from_bytes(data, path="p")).leaves]:
        with pytest.MonkeyPatch.context() as patch:
            outline = LazyManifest(data, path="p")
            patch.setattr(lazy_manifest, "LARGE_OBJECT_BYTES", 0)
            patch.setattr(lazy_manifest, "_MANY", 0)
            assert LazyManifest(data, path="p").find(name) == outline.find(name), name


@pytest.mark.parametrize(
    "name", ["w", 'quote"', "back\\slash", "line\n", "ä", "", "a.b", " ", "\x7f"]
)
def test_a_tensor_of_any_name_is_searched(name, every_object_is_large):
    entry = a_manifest().tensors["w"]
    state = {name: {"$tensor": name}, "other": 1}
    data = to_bytes(a_manifest(tensors={"v": entry, name: entry}, state=state, per_rank=()))
    for _ in range(9):
        outline = LazyManifest(data, path="p")
        assert outline.find(name) == (name or None)
        assert outline.tensor(name).chunks.tolist() == entry.chunks.tolist()
        assert outline.tensor("x") is outline.find("\ud800") is None


def test_an_object_is_searched_a_few_times_and_then_decoded(every_object_is_large, monkeypatch):
    searches = []
    search = lazy_manifest._search
    monkeypatch.setattr(lazy_manifest, "_search", lambda *a: searches.append(a) or search(*a))
    outline, _ = both()
    entries = [outline.tensor("w") or outline.tensor("nothing") for _ in range(9)]
    assert entries == [outline.tensor("w")] * 9
    assert len(searches) == 1
    assert [outline.tensor("nothing") for _ in range(9)] == [None] * 9
    assert len(searches) == lazy_manifest._MOST_SEARCHES


def test_a_long_list_is_parsed_where_it_is_read(monkeypatch):
    monkeypatch.setattr(lazy_manifest, "LONG_BYTES", 0)
    outline, manifest = both()
    whole = manifest.tensors["w"].chunks
    assert outline.tensor("w").chunks.tolist() == whole.tolist()
    assert chunks_in(outline.tensor("w"), (2, 0), (1, 1)).tolist() == whole[1:].tolist()
    assert outline.tensor("s") is outline.tensor("e") is None


@pytest.mark.parametrize(
    "facts",
    [
        *({"shape": shape} for shape in ([-4, 2], [1 << 40] * 2, [1] * 65, [0, 2])),
        *({"chunks": chunks} for chunks in ([0, 1], [0, 1 << 70], {})),
        {"dtype": "F33"},
    ],
)
def test_a_long_list_of_an_invalid_tensor(facts, monkeypatch):
    monkeypatch.setattr(lazy_manifest, "LONG_BYTES", 0)
    changed = document()
    changed["tensors"]["w"].update(facts)
    text = sealed(changed)
    entry = LazyManifest(text, path="p").tensor("w")
    if entry is not None:
        with pytest.raises(errors.CorruptionError):
            chunks_in(entry, (0, 0), (1, 1))
    with pytest.raises(errors.CorruptionError):
        from_bytes(text, path="p")


def test_tensors_are_those_of_the_complete_manifest():
    outline, manifest = both()
    assert outline.tensor("w").chunks.tolist() == manifest.tensors["w"].chunks.tolist()
    assert outline.tensor("w").shape == manifest.tensors["w"].shape
    assert outline.tensors == {"w": outline.tensor("w")}
    assert outline.tensor("s") is outline.tensor("e") is outline.tensor("nothing") is None
    mine, whole = outline.shards[0], manifest.shards[0]
    assert (mine.name, mine.size_bytes) == (whole.name, whole.size_bytes)
    assert mine.digests.tolist() == whole.digests.tolist()


SLABS = {
    "rows": ((6, 2), [[0, 8, 40, 0, 0, 4, 2], [1, 800, 816, 4, 0, 2, 2]]),
    "columns": ((2, 6), [[1, 8, 16, 0, 0, 2, 1], [0, 8, 48, 0, 1, 2, 5]]),
    "whole": ((2, 1, 3), [[0, 8, 32, 0, 0, 0, 2, 1, 3]]),
}


@pytest.mark.parametrize("kind", SLABS)
@given(st.data())
def test_a_tensor_that_violates_the_format_is_not_found(kind, data):
    """One number is another, or a row is gone, there twice, or elsewhere in its file."""
    shape, rows = SLABS[kind]
    numbers = np.array(rows, np.int64)
    shards = tuple(
        ShardEntry(name=name, size_bytes=size, digests=np.array([7], np.uint64))
        for name, size in ((SHARD, 100), (SHARD.replace("0-", "1-"), 1000))
    )
    manifest = replace(
        a_manifest(state={}, shards=shards, per_rank=()),
        tensors={"w": TensorEntry(dtype="F32", shape=shape, chunks=numbers)},
    )
    assert LazyManifest(to_bytes(manifest), path="p").tensor("w").chunks.tolist() == rows
    row, column = (data.draw(st.integers(0, size - 1)) for size in numbers.shape)
    changed = numbers.copy()
    change = data.draw(st.sampled_from(["number", "place", "rows"]))
    if change == "number":
        number = st.integers(-1, 9) | st.sampled_from([104, 1004, 2**62, -(2**63)])
        changed[row, column] = data.draw(number)
    elif change == "place":
        changed[row, 1:3] += data.draw(st.integers(-60, 60))
    else:
        times = data.draw(st.sampled_from([0, 2]))
        changed = np.repeat(numbers, [times if i == row else 1 for i in range(len(rows))], axis=0)
    tensors = {"w": TensorEntry(dtype="F32", shape=shape, chunks=changed)}
    text = to_bytes(replace(manifest, tensors=tensors))
    if LazyManifest(text, path="p").tensor("w") is not None:
        from_bytes(text, path="p")


@pytest.mark.parametrize(
    ("shape", "rows", "dtype"),
    [
        ((2, -3), [[0, 40, 16, 0, 0, 2, -3]], "F32"),
        ((6, 1), [[0, 8, 36, 0, 0, 7, 1], [0, 44, 40, 7, 0, -1, 1]], "F32"),
        ((6, 1), [[0, 8, 32, 0, 0, 6, 1]], "F33"),
        ((6, 1), [[0, 4980, 5004, 0, 0, 6, 1]], "F32"),
    ],
)
def test_numbers_that_fit_each_other_are_not_right_yet(shape, rows, dtype):
    wrong = TensorEntry(dtype=dtype, shape=shape, chunks=np.array(rows, np.int64))
    text = to_bytes(a_manifest(state={}, per_rank=(), tensors={"w": wrong}))
    assert LazyManifest(text, path="p").tensor("w") is None
    with pytest.raises(errors.CorruptionError):
        from_bytes(text, path="p")


@pytest.mark.parametrize("elements", [2**67, 2**42], ids=["no int64", "too large for memory"])
def test_a_shard_is_no_larger_than_its_digests_say(elements):
    changed, size = document(), 8 + 4 * elements
    changed["shards"][0]["size"] = size
    row = [0, 8, size, 0, elements]
    changed["tensors"]["w"] = {"dtype": "F32", "shape": [elements], "chunks": row}
    text = sealed(changed)
    for parse in (from_bytes, lambda text, path: LazyManifest(text, path=path).tensor("w")):
        with pytest.raises(errors.CorruptionError, match="one digest for each block"):
            parse(text, path="p")


@pytest.mark.parametrize(
    "node", [{"$tensor": "w", "a": "b"}, {"$per_rank": "0"}, {"$bytes": ""}, {}, ["w"], "w"]
)
def test_what_is_no_reference_to_a_tensor(node):
    assert LazyManifest(to_bytes(a_manifest(state={"a": node})), path="p").find("a") is None


@pytest.mark.parametrize("damage", ["shards", "state", "tensors"])
def test_a_member_that_is_missing(damage):
    text = to_bytes(a_manifest()).replace(f'"{damage}"'.encode(), b'"x"')
    with pytest.raises(errors.CorruptionError, match=damage):
        LazyManifest(text, path="p")
