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
        ({"net.a": "net.ab"}, "net.ab"),
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
