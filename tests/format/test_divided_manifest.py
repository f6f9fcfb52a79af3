"""Ranks that check a large manifest together refuse what one rank alone refuses, and each of them
reads nothing that its own checks do not cover."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt import errors
from shardckpt.format import divided_manifest, manifest
from shardckpt.format.digests import text_digest
from shardckpt.format.divided_manifest import check_manifest_parts, chunks_of, part_from_bytes
from shardckpt.format.entries import ShardEntry, TensorEntry
from shardckpt.format.manifest import from_bytes, to_bytes
from tests.format.test_manifest import HOSTILE, SHARD, a_manifest, document, sealed

RANKS = 3


@pytest.fixture(autouse=True, scope="module")
def every_list_is_long():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "LARGE_BYTES", 0)
        patch.setattr(manifest, "_BATCH_BYTES", 20)
        patch.setattr(divided_manifest, "LARGE_BYTES", 0)
        patch.setattr(divided_manifest, "LONG_BYTES", 0)
        yield


def chunks_in(entry, offsets, sizes):
    """The chunks that a rank parses for one box."""
    return chunks_of([(entry, SimpleNamespace(offsets=offsets, sizes=sizes))])[0]


def parts(text, *, ranks=RANKS):
    return [part_from_bytes(text, path="p", rank=r, world_size=ranks) for r in range(ranks)]


def together(text, *, ranks=RANKS):
    """The manifest of each rank, once all have checked it together."""
    found = parts(text, ranks=ranks)
    ranges = [each.part.ranges for each in found]
    check_manifest_parts(ranges, len(found[0].shards), lambda: text, path="p")
    return found


@pytest.mark.parametrize("ranks", [2, 3, 100])
def test_the_manifest_is_that_of_one_rank(ranks):
    text = to_bytes(a_manifest())
    whole = from_bytes(text, path="p")
    for found in together(text, ranks=ranks):
        assert to_bytes(found) == text
        assert list(found.tensors) == list(whole.tensors)
        for name, entry in found.tensors.items():
            assert (entry.dtype, entry.shape) == (
                whole.tensors[name].dtype,
                whole.tensors[name].shape,
            )
            assert entry.chunks.tolist() == whole.tensors[name].chunks.tolist()
            assert entry.size_bytes == whole.tensors[name].size_bytes
        assert len({entry.identity() for entry in found.tensors.values()}) == len(whole.tensors)


def test_one_rank_checks_everything_itself():
    text = to_bytes(a_manifest())
    assert part_from_bytes(text, path="p", rank=0, world_size=1).part is None


@pytest.mark.parametrize("name", HOSTILE)
def test_ranks_together_refuse_hostile_manifests(name):
    changed = document()
    HOSTILE[name](changed)
    for parse in (together, lambda text: from_bytes(text, path="p")):
        with pytest.raises(errors.CorruptionError) as caught:
            parse(sealed(changed))
        assert caught.value.path == "p"
        assert caught.value.remedy


def test_white_space_and_repeated_keys():
    text = to_bytes(a_manifest())
    body = text[: text.rindex(b',"digest"')]
    for old, new in (
        (b'"version":1', b'"version": 1'),
        (b'"notes":{', b'"notes":{"tool":"text",'),
        (b"shardckpt test", b"shardckpt \\u0074est"),
        (b'"tensors":{', b'"tensors":{"s":{"dtype":"I8","shape":[],"chunks":[0,4128,4129]},'),
        (b"[0,4128,4129]", b"[0,4128, 4129]"),
        (b"[0,4128,4129]", b"[00,4128,4129]"),
        (b"[0,4128,4129]", b"[-0,4128,4129]"),
        (b'"s":{"dtype"', b'"s": {"dtype"'),
    ):
        other = body.replace(old, new)
        assert other != body
        with pytest.raises(errors.CorruptionError, match="violates the format"):
            together(other + f',"digest":"{text_digest(other)}"}}\n'.encode())


def test_every_bit_of_a_manifest():
    whole = to_bytes(a_manifest())
    for at, bit in itertools.product(range(len(whole)), range(8)):
        changed = bytearray(whole)
        changed[at] ^= 1 << bit
        with pytest.raises(errors.CheckpointError):
            part_from_bytes(bytes(changed), path="p", rank=RANKS - 1, world_size=RANKS)


ITEM = 4
SHARDS = tuple(
    ShardEntry(name=name, size_bytes=1 << 12, digests=np.array([7], np.uint64))
    for name in (SHARD, SHARD.replace("0-", "1-"))
)
BORDERS = st.sets(st.integers(1, 5), max_size=3)


@st.composite
def layouts(draw):
    """A shape, and chunks of it, mostly in the order that this library writes."""
    cuts = [sorted({0, 6, *draw(BORDERS)}) for _ in range(draw(st.integers(1, 3)))]
    rows, at = [], [8, 8]
    for box in itertools.product(*(itertools.pairwise(borders) for borders in cuts)):
        shard = draw(st.integers(0, 1))
        low, sizes = zip(*((low, high - low) for low, high in box), strict=True)
        end = at[shard] + ITEM * int(np.prod(sizes))
        rows.append([shard, at[shard], end, *low, *sizes])
        at[shard] = end
    if draw(st.integers(0, 3)) == 0:
        rows = draw(st.permutations(rows))
    return (6,) * len(cuts), np.array(rows, np.int64)


def text_of(shape, chunks):
    tensors = {"w": TensorEntry(dtype="F32", shape=shape, chunks=chunks)}
    return to_bytes(
        replace(a_manifest(state={}, shards=SHARDS, per_rank=(), tensors={}), tensors=tensors)
    )


@st.composite
def boxes(draw, dims):
    low = tuple(draw(st.integers(0, 5)) for _ in range(dims))
    return low, tuple(draw(st.integers(1, 6 - at)) for at in low)


def in_box(chunks, offsets, sizes):
    """The rows that share elements with a box."""
    dims = len(offsets)
    low, size = chunks[:, 3 : 3 + dims], chunks[:, 3 + dims :]
    hit = (low < np.add(offsets, sizes)) & (low + size > np.array(offsets))
    return sorted(map(tuple, chunks[hit.all(axis=1)].tolist()))


@given(st.data())
def test_a_box_has_the_chunks_that_the_complete_list_has(data):
    shape, chunks = data.draw(layouts())
    offsets, sizes = data.draw(boxes(len(shape)))
    for found in together(text_of(shape, chunks), ranks=2):
        rows = chunks_in(found.tensors["w"], offsets, sizes)
        assert in_box(rows, offsets, sizes) == in_box(chunks, offsets, sizes)


def covered_once(chunks, offsets, sizes):
    """Whether chunks give each element of a box once, from separate bytes of their shards."""
    dims, bytes_used = len(offsets), []
    times = np.zeros((6,) * dims, int)
    for shard, begin, end, *box in in_box(chunks, offsets, sizes):
        low, size = box[:dims], box[dims:]
        if not (0 <= shard < 2 and 8 <= begin < end <= 1 << 12 and begin % ITEM == 0):
            return False
        if end - begin != ITEM * int(np.prod(size)) or min(low) < 0 or max(np.add(low, size)) > 6:
            return False
        bytes_used += [(shard, byte) for byte in range(begin, end)]
        times[tuple(slice(at, at + n) for at, n in zip(low, size, strict=True))] += 1
    wanted = times[tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))]
    return bool((wanted == 1).all()) and len(set(bytes_used)) == len(bytes_used)


@st.composite
def broken(draw):
    """Chunks with one number changed, one row missing, or one row there twice."""
    shape, chunks = draw(layouts())
    row, column = (draw(st.integers(0, size - 1)) for size in chunks.shape)
    changed = chunks.copy()
    change = draw(st.sampled_from(["number", "step", "place", "rows"]))
    if change == "number":
        changed[row, column] = draw(st.integers(-1, 9) | st.sampled_from([2**62, -(2**63), 10**15]))
    elif change == "step":
        changed[row, column] += draw(st.sampled_from([-4, -1, 1, 4]))
    elif change == "place":
        changed[row, 1:3] += draw(st.integers(-60, 60))
    else:
        times = draw(st.sampled_from([0, 2]))
        changed = np.repeat(chunks, [times if i == row else 1 for i in range(len(chunks))], axis=0)
    return shape, changed


def try_broken(shape, chunks, offsets, sizes):
    """A rank that checked nothing reads only what is right by itself, and all ranks together refuse
    what one rank alone refuses."""
    text = text_of(shape, chunks)
    unchecked = part_from_bytes(text, path="p", rank=RANKS - 1, world_size=RANKS)
    assert not len(unchecked.part.ranges)
    try:
        rows = chunks_in(unchecked.tensors["w"], offsets, sizes)
    except errors.CorruptionError as error:
        assert error.tensor == "w"
    else:
        assert covered_once(rows, offsets, sizes), (rows, offsets, sizes)
    try:
        from_bytes(text, path="p")
    except errors.CorruptionError:
        with pytest.raises(errors.CorruptionError):
            together(text)
    else:
        together(text)


@given(st.data())
def test_broken_chunks_are_refused_or_not_read(data):
    shape, chunks = data.draw(broken())
    try_broken(shape, chunks, *data.draw(boxes(len(shape))))


def rows_of(count, *, begin=8):
    return np.array([[0, begin + 8 * i, begin + 8 * i + 8, i, 0, 1, 2] for i in range(count)])


def test_few_chunks_of_a_long_list_are_returned():
    entry = together(text_of((300, 2), rows_of(300)), ranks=2)[1].tensors["w"]
    assert chunks_in(entry, (100, 1), (3, 1)).tolist() == rows_of(300)[100:103].tolist()


def test_a_list_is_parsed_once_for_many_boxes():
    """A search for each box would take the square of the time."""
    listed = together(text_of((40, 2), rows_of(40)))[1].tensors["w"]
    boxes = [SimpleNamespace(offsets=(at, 0), sizes=(1, 2)) for at in range(40)]
    found = chunks_of([(listed, box) for box in boxes])
    assert {id(rows) for rows in found} == {id(found[0])}
    assert found[0].tolist() == listed.chunks.tolist()


def test_boxes_of_several_tensors():
    """Two boxes of one tensor share a chunk; a list of another tensor is not sorted."""
    rows, other = rows_of(9), rows_of(9, begin=1000)[::-1]
    tensors = {
        name: TensorEntry(dtype="F32", shape=(9, 2), chunks=chunks)
        for name, chunks in (("w", rows), ("v", other))
    }
    text = to_bytes(a_manifest(state={}, per_rank=(), shards=SHARDS, tensors=tensors))
    found = together(text)[0].tensors
    wanted = [
        (found[name], SimpleNamespace(offsets=(at, 0), sizes=(2, 2)))
        for name, at in (("w", 0), ("w", 1), ("v", 3), ("w", 7))
    ]
    one, two, three, four = (chunks.tolist() for chunks in chunks_of(wanted))
    assert one == rows[:2].tolist()
    assert two == rows[1:3].tolist()
    assert three == other.tolist()
    assert four == rows[7:].tolist()
    one, two = (chunks.tolist() for chunks in chunks_of(wanted[::3]))
    assert (one, two) == (rows[:2].tolist(), rows[7:].tolist())


def shared_bytes():
    """Two tensors that no rank checks together have the same bytes."""
    tensors = {
        name: TensorEntry(dtype="F32", shape=(4, 2), chunks=rows_of(4, begin=begin))
        for name, begin in (("a", 8), ("b", 32))
    }
    return to_bytes(a_manifest(state={}, per_rank=(), shards=SHARDS, tensors=tensors))


def test_bytes_that_tensors_of_different_ranks_share():
    assert [len(part.part.ranges) for part in parts(shared_bytes())] == [1, 1, 0]
    with pytest.raises(errors.CorruptionError, match="don't overlap") as caught:
        together(shared_bytes())
    assert caught.value.tensor == "b"


HOLE = (6, 2), rows_of(6)[[0, 1, 2, 3, 5]]
BOX = (0, 0), (2, 2)


def test_a_hole_that_the_reads_do_not_reach():
    with pytest.raises(errors.CorruptionError, match="tile"):
        together(text_of(*HOLE))


def test_a_hole_that_a_read_reaches():
    with pytest.raises(errors.CorruptionError, match="tile"):
        chunks_in(parts(text_of(*HOLE), ranks=100)[99].tensors["w"], (3, 0), (2, 2))


def test_ranks_that_do_not_compare_their_parts_would_be_seen(monkeypatch):
    """A planted fault, like those below."""
    monkeypatch.setattr(divided_manifest, "overlap", lambda ranges, shards: False)
    together(shared_bytes())


def test_lists_that_no_rank_checks_would_be_seen(monkeypatch):
    monkeypatch.setattr(divided_manifest, "_own", lambda long, rank, world_size: [])
    together(text_of(*HOLE))


def test_a_read_without_checks_would_be_seen(monkeypatch):
    def unchecked(columns, size_bytes, path):
        pass

    monkeypatch.setattr(divided_manifest, "check_chunks", unchecked)
    for change in ((1, 1, 4), (1, 2, 1 << 13), (1, 0, 2), (0, 5, 2), (1, 6, 3)):
        rows = rows_of(6)
        rows[change[:2]] = change[2]
        with pytest.raises(AssertionError):
            try_broken((6, 2), rows, (0, 0), (3, 2))
