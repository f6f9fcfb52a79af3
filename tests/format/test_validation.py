"""The rules of a manifest, checked on its parsed parts. test_manifest has complete manifests."""

from __future__ import annotations

import numpy as np
import pytest

from shardckpt.errors import CorruptionError
from shardckpt.format.validation import Columns, check_chunks, check_references

SHARDS = np.array([100, 100])
GOOD = [[0, 8, 16, 0, 2], [1, 8, 16, 2, 2]]


def columns(rows, *, item=4, shape=(4,)):
    return Columns(
        names=["w"],
        items=np.array([item]),
        shapes=np.array([shape]),
        counts=np.array([len(rows)]),
        chunks=np.array(rows, np.int64).reshape(len(rows), 3 + 2 * len(shape)),
    )


def test_chunks_that_tile_their_tensors_are_accepted():
    check_chunks([columns(GOOD)], SHARDS, "p")
    check_chunks([columns(GOOD[::-1])], SHARDS, "p")
    check_chunks([], SHARDS, "p")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([GOOD[0], [2, 8, 16, 2, 2]], "a shard from 0 to 1"),
        ([GOOD[0], [-1, 8, 16, 2, 2]], "a shard from 0 to 1"),
        ([GOOD[0], [1, 4, 12, 2, 2]], "bytes within the shard"),
        ([GOOD[0], [1, 96, 104, 2, 2]], "bytes within the shard"),
        ([GOOD[0], [1, 10, 18, 2, 2]], "aligned to its element size"),
        ([GOOD[0], [0, 12, 20, 2, 2]], "don't overlap in the file"),
        ([GOOD[0], [1, 8, 20, 2, 2]], "8 bytes in a chunk"),
        ([GOOD[0]], "tile the shape [4]"),
        ([GOOD[0], [1, 8, 16, 1, 2]], "tile the shape [4]"),
        ([GOOD[0], [1, 8, 16, 3, 2]], "tile the shape [4]"),
    ],
)
def test_each_broken_rule_of_chunks_is_named_with_path_and_tensor(rows, expected):
    with pytest.raises(CorruptionError) as caught:
        check_chunks([columns(rows)], SHARDS, "here")
    assert expected in caught.value.expected
    assert (caught.value.path, caught.value.tensor) == ("here", "w")


def test_chunks_of_different_tensors_may_not_share_bytes():
    other = columns([[0, 12, 16]], shape=())._replace(names=["s"])
    with pytest.raises(CorruptionError, match="don't overlap") as caught:
        check_chunks([columns(GOOD), other], SHARDS, "p")
    assert caught.value.tensor in ("w", "s")


def test_references_need_their_targets():
    tree = {"a": [{"$tensor": "w"}, {"$ndarray": "w"}], "r": {"$per_rank": "1"}}
    check_references(tree, [[1, 2], [3, 4]], {"w"}, "p")
    for wrong in ({"$tensor": "v"}, {"$ndarray": 3}, {"$per_rank": "2"}, {"$tensor": ["w"]}):
        with pytest.raises(CorruptionError, match="references"):
            check_references({"a": [wrong]}, [[1, 2], [3, 4]], {"w"}, "p")


def test_a_value_of_each_rank_is_referenced_only_if_every_rank_has_it():
    with pytest.raises(CorruptionError):
        check_references({"$per_rank": "1"}, [[1, 2], [3]], (), "p")
    with pytest.raises(CorruptionError):
        check_references({"$per_rank": "0"}, [], (), "p")


@pytest.mark.parametrize(("levels", "fits"), [(300, True), (301, False)])
def test_nesting_is_limited(levels, fits):
    node: object = 1
    for _ in range(levels):
        node = [node]
    if fits:
        check_references(node, [], (), "p")
    else:
        with pytest.raises(CorruptionError, match="300 levels"):
            check_references(node, [], (), "p")
