"""Typed JSON without some of its tensors."""

from __future__ import annotations

import copy

import pytest

from shardckpt.state.name_filters import without_tensors

A, B, ARRAY = {"$tensor": "a"}, {"$tensor": "b"}, {"$ndarray": "a"}


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"x": A, "y": B, "n": 1}, {"y": B, "n": 1}),
        ({"x": {"y": ARRAY}}, {"x": {}}),
        ([A, B, 3], [None, B, 3]),
        ({"$tuple": [A, 1]}, {"$tuple": [None, 1]}),
        ({"$dict": [[1, A], [2, B]]}, {"$dict": [[2, B]]}),
        ({"$dict": [[1, {"x": A}]]}, {"$dict": [[1, {}]]}),
        (A, None),
        (B, B),
        (7, 7),
        ({"$per_rank": "a"}, {"$per_rank": "a"}),
        ({"$tensor": "b", "other": A}, {"$tensor": "b"}),
    ],
)
def test_references_to_lost_tensors_are_removed(node, expected):
    before = copy.deepcopy(node)
    assert without_tensors(node, {"a"}) == expected
    assert node == before


def test_without_lost_tensors_nothing_changes():
    node = {"x": [A, {"$dict": [[1, B]]}], "t": {"$tuple": [1, None]}}
    assert without_tensors(node, set()) == node
