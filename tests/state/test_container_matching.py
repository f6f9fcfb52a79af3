"""Dicts, lists, values, markers and objects of a state receive what was saved."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.state.container_matching import match_mapping
from shardckpt.state.markers import FromRank0, PerRank, Union
from shardckpt.state.matching import _match
from shardckpt.state.mismatches import Mismatches
from tests.state.saved import Saved


class Holder:
    """An object with state; its tensors may be one and the same."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def state_dict(self):
        return dict(self.tensors)

    def load_state_dict(self, state):
        self.tensors = state


def test_tensors_of_objects_are_filled_in_place(tmp_path):
    shardckpt.save({"h": Holder(a=torch.ones(2))}, tmp_path / "c")
    target = Holder(a=torch.zeros(2))
    place = target.tensors["a"]
    shardckpt.load({"h": target}, tmp_path / "c")
    assert target.tensors["a"] is place
    assert place.tolist() == [1, 1]


def test_a_counter_is_one_value(tmp_path):
    shardckpt.save({"c": Counter("aab"), "none": Counter()}, tmp_path / "c")
    state = {"c": Counter("xyy"), "none": Counter("z")}
    shardckpt.load(state, tmp_path / "c")
    assert state == {"c": Counter("aab"), "none": Counter()}


def matched(saved, template, *, ranks=1):
    """The state that matching and reading make of a template, and the context."""
    context = saved.context(template, ranks=ranks)
    finish = _match(context, template, "")
    saved.read(context.reads)
    return finish(), context


def test_values_are_replaced_in_the_containers_of_the_caller():
    template = {"d": {"a": 0}, "l": [0, 0], "t": (0, 0), "empty": {}, "none": []}
    inner = template["d"], template["l"], template["empty"], template["none"]
    saved = Saved({"d": {"a": 1}, "l": [2, 3], "t": (4, 5), "empty": {"x": 6}, "none": [7]})
    state, context = matched(saved, template)
    assert state is template
    assert state == {"d": {"a": 1}, "l": [2, 3], "t": (4, 5), "empty": {"x": 6}, "none": [7]}
    after = state["d"], state["l"], state["empty"], state["none"]
    assert all(a is b for a, b in zip(inner, after, strict=True))
    assert context.mismatches == Mismatches()


def test_entries_without_a_key_in_the_state_stay_unused():
    state, context = matched(Saved({"a": 1, "b": 2}), {"a": 0})
    context.note_missing_and_unused()
    assert state == {"a": 1}
    assert context.mismatches.unexpected == ["b"]


class Point(NamedTuple):
    x: int
    y: int


class Wider(NamedTuple):
    x: int
    y: int
    z: int


def test_a_named_tuple_keeps_its_class_and_its_length():
    state, _ = matched(Saved({"p": Point(1, 2)}), {"p": Point(0, 0)})
    assert state["p"] == Point(1, 2)
    assert type(state["p"]) is Point
    state, context = matched(Saved({"p": Point(1, 2)}), {"p": Wider(0, 0, 0)})
    assert state["p"] == Wider(0, 0, 0)
    assert [name for name, *_ in context.mismatches.wrong_shape] == ["p"]


@dataclass
class Settings:
    rate: float
    steps: int = 0


@dataclass(frozen=True)
class Frozen:
    rate: float


def test_a_dataclass_is_changed_in_place_and_a_frozen_one_is_copied():
    template = {"s": Settings(0.0), "f": Frozen(0.0)}
    settings, frozen = template.values()
    state, _ = matched(Saved({"s": Settings(0.5, 3), "f": Frozen(0.25)}), template)
    assert state["s"] is settings
    assert settings == Settings(0.5, 3)
    assert state["f"] == Frozen(0.25)
    assert frozen == Frozen(0.0)


def test_a_read_only_mapping_is_refused_and_a_proxy_is_replaced():
    class ReadOnly(Mapping):
        def __getitem__(self, key):
            return {"a": torch.zeros(1)}[key]

        def __iter__(self):
            return iter("a")

        def __len__(self):
            return 1

    saved = Saved({"m": {"a": 5}})
    with pytest.raises(errors.StateError, match="read-only mapping") as caught:
        match_mapping(saved.context(), ReadOnly(), "m", _match)
    assert caught.value.tensor == "m"
    proxy = types.MappingProxyType({"a": 0, "b": 1})
    assert dict(match_mapping(saved.context(), proxy, "m", _match)()) == {"a": 5, "b": 1}


@pytest.mark.parametrize(
    ("on_resize", "expected"),
    [("keep", 0), ("wrap", 7), (lambda values: sum(values) + 1, 8)],
    ids=["keep", "wrap", "a function"],
)
def test_on_resize_decides_for_another_number_of_ranks(tmp_path, on_resize, expected):
    saved = Saved({"r": PerRank(7)}, tmp_path / "c")
    state, context = matched(saved, {"r": PerRank(0, on_resize)}, ranks=3)
    assert state["r"] == PerRank(expected, on_resize)
    assert context.kept == (["r"] if on_resize == "keep" else [])


def test_with_as_many_ranks_each_rank_gets_its_own_value(tmp_path):
    saved = Saved({"r": PerRank({"seed": 7})}, tmp_path / "c")
    state, context = matched(saved, {"r": PerRank({"seed": 0}, "error")})
    assert state["r"].value == {"seed": 7}
    assert context.kept == []
    with pytest.raises(errors.StateError, match="another number of ranks") as caught:
        matched(saved, {"r": PerRank({"seed": 0}, "error")}, ranks=2)
    assert (caught.value.tensor, caught.value.actual) == ("r", "2 ranks")


def test_markers_keep_their_type():
    template = {"f": FromRank0({"a": 0}), "u": Union({"k": 0})}
    state, _ = matched(Saved({"f": {"a": 1}, "u": {"k": 2}}), template)
    assert state == {"f": FromRank0({"a": 1}), "u": Union({"k": 2})}


def test_an_object_gets_its_own_per_rank_value(tmp_path):
    shardckpt.save(
        {"h": Holder(r=PerRank(7), l=(PerRank({"t": torch.ones(2)}), 1))}, tmp_path / "c"
    )
    target = Holder()
    shardckpt.load({"h": target}, tmp_path / "c")
    assert target.tensors["r"] == 7
    assert target.tensors["l"][0]["t"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("marker", "expected"),
    [(PerRank(0), 0), (PerRank(0, "wrap"), 7), (PerRank(0, sum), 7)],
    ids=["keep", "wrap", "a function"],
)
def test_the_marker_of_an_object_decides_for_another_number_of_ranks(tmp_path, marker, expected):
    saved = Saved({"h": Holder(r=PerRank(7))}, tmp_path / "c")
    state, context = matched(saved, {"h": Holder(r=marker)}, ranks=3)
    assert state["h"].tensors == {"r": expected}
    assert context.kept == (["h.r"] if marker.on_resize == "keep" else [])


def test_without_a_marker_no_value_stands_for_another_number_of_ranks(tmp_path):
    saved = Saved({"h": Holder(r=PerRank(7))}, tmp_path / "c")
    with pytest.raises(errors.StateError, match="another number of ranks") as caught:
        matched(saved, {"h": Holder(r=0)}, ranks=3)
    assert caught.value.tensor == "h.r"
