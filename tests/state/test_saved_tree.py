"""Saved entries are selected and renamed."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt import errors

STATE = {
    "net": {"a": {"w": torch.ones(1), "b": torch.ones(2)}, "ab": {"w": torch.ones(3)}},
    "list": [torch.ones(4), 5],
    "pair": (1, 2),
    "step": 6,
}


@pytest.fixture
def path(tmp_path):
    shardckpt.save(STATE, tmp_path / "c")
    return tmp_path / "c"


def names(state, prefix="") -> set[str]:
    if not isinstance(state, (dict, list, tuple)):
        return {prefix}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {n for k, v in items for n in names(v, f"{prefix}.{k}" if prefix else str(k))}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("net.a", {"net.a.w", "net.a.b"}),  # whole keys: not net.ab
        ("net.a.", {"net.a.w", "net.a.b"}),
        ("net.*.w", {"net.a.w", "net.ab.w"}),
        (["step", "list.1"], {"step", "list.0", "list.1"}),  # a list keeps its places
        ("*", {"net.a.w", "net.a.b", "net.ab.w", "list.0", "list.1", "pair.0", "pair.1", "step"}),
        ([], set()),
    ],
)
def test_keys_select_entries(path, keys, expected):
    assert names(shardckpt.load_state(path, keys=keys)) == expected


@pytest.mark.parametrize(
    ("rename", "present", "absent"),
    [
        ({"net.a": "net.c"}, {"net.c.w", "net.ab.w"}, {"net.a.w"}),
        ({"net": ""}, {"a.w", "ab.w", "step"}, {"net.a.w"}),
        ({"net": "x", "net.a": "y"}, {"y.w", "x.ab.w"}, {"x.a.w"}),  # the longest wins
        (lambda name: name.replace("net.", "module.net."), {"module.net.a.w"}, {"net.a.w"}),
        ({"step": "count"}, {"count"}, {"step"}),
    ],
)
def test_rename_maps_prefixes(path, rename, present, absent):
    with shardckpt.open_checkpoint(path) as opened:
        found = set(flat(opened.load_state(rename=rename)))
    assert present <= found
    assert not absent & found


def flat(state) -> list[str]:
    """Names, whether keys hold dots or not."""
    return sorted(names(state))


def test_renamed_entries_load_in_place(path):
    target = {"other": {"w": torch.zeros(1)}}
    report = shardckpt.load(target, path, rename={"net.a": "other"}, keys=["other.w"])
    assert target["other"]["w"].item() == 1
    assert report.unexpected == ()


@pytest.mark.parametrize(
    ("rename", "name"),
    [
        ({"net.a": "net.ab"}, "net.ab.w"),
        ({"net.ab": "net.a.w"}, "net.a.w"),
        ({"net.ab.w": "net.ab"}, "net.ab"),
        ({"list.0": "list.1"}, "list.1"),
        ({"net": "list"}, "list"),  # at the top
        ({"net.a.w": "step"}, "step"),  # moved to the top
        ({"net.a.w": "list.0"}, "list.0"),
        ({"net.a.w": "net.ab.w"}, "net.ab.w"),
        ({"net.a.w": "x", "list.0": "x"}, "x"),
        ({"net.a": "x", "list.0": "x.w"}, "x.w"),
    ],
)
def test_two_names_made_one(path, rename, name):
    with pytest.raises(errors.StateError, match="same name") as caught:
        shardckpt.load_state(path, rename=rename)
    assert caught.value.tensor == name


@pytest.mark.parametrize("load", ["load_state", "convert"])
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("net", {"a": {"w": 1, "b": 2}, "ab": {"w": 3}}),
        ("net.a", {"w": 1, "b": 2}),
        ("pair", {"0": 1, "1": 2}),
    ],
)
def test_a_prefix_that_is_removed_leaves_no_level(path, tmp_path, load, key, expected):
    if load == "convert":
        shardckpt.convert(path, tmp_path / "out", keys=[key], rename={key: ""})
        state = shardckpt.load_state(tmp_path / "out")
    else:
        state = shardckpt.load_state(path, keys=list(expected), rename={key: ""})
    assert sizes(state) == expected


def sizes(state):
    if isinstance(state, dict):
        return {key: sizes(item) for key, item in state.items()}
    return state.numel() if isinstance(state, torch.Tensor) else state


def test_dicts_of_the_same_name_become_one(path):
    state = shardckpt.load_state(path, rename={"net.ab.w": "net.a.c", "net.ab": "net.a"})
    assert sizes(state["net"]) == {"a": {"w": 1, "b": 2, "c": 3}}


def test_an_entry_needs_a_name(path):
    with pytest.raises(errors.StateError, match="no name"):
        shardckpt.load_state(path, rename={"step": ""})


def test_the_items_of_a_list_keep_their_indices(path):
    target = {"list": [torch.zeros(4), 0], "x": torch.zeros(4)}
    with pytest.raises(errors.LoadMismatchError) as caught:
        shardckpt.load(target, path, rename={"list.0": "x"}, keys=["list", "x"])
    assert caught.value.missing == ("list.0",)
    assert shardckpt.load_state(path, rename={"list.0": "x"})["list"] == [None, 5]


def test_a_place_in_a_list_that_is_gone_is_a_free_name(tmp_path):
    saved = {"l": [torch.zeros(1), torch.ones(1)], "x": torch.full((1,), 2.0)}
    shardckpt.save(saved, tmp_path / "c")
    target = {"l": {"1": torch.zeros(1)}}
    rename = {"l.0": "a", "l.1": "b", "x": "l.1"}
    shardckpt.load(target, tmp_path / "c", rename=rename)
    assert target["l"]["1"].item() == 2
