"""A source of any format is loaded into a state: each rank reads the boxes that it holds."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.convert.source_loading import load_source
from shardckpt.convert.sources import foreign
from shardckpt.coordination.exchange import attempt
from shardckpt.coordination.single import SingleCoordinator

SAVED = {"w": torch.arange(6.0).reshape(2, 3), "h": torch.ones(2, dtype=torch.float16), "n": 5}


def load(state, saved=SAVED, *, strict=True, cast=False, **options):
    source = attempt(foreign, "some/path", "a test", saved)
    ranks = SingleCoordinator()
    return load_source(state, "some/path", source, ranks, strict=strict, cast=cast, **options)


def test_a_state_is_filled_in_place():
    state = {"w": torch.zeros(2, 3), "h": torch.zeros(2, dtype=torch.float16), "n": 0}
    before = state["w"]
    report = load(state)
    assert state["w"] is before
    assert torch.equal(before, SAVED["w"])
    assert (state["h"].tolist(), state["n"]) == ([1, 1], 5)
    assert report.bytes_read == 6 * 4 + 2 * 2
    assert (report.path, report.saved_world_size) == ("some/path", 1)
    assert (report.missing, report.unexpected, report.cast, report.kept) == ((), (), (), ())
    assert report.seconds.keys() == {"plan", "read"}


def test_only_the_box_of_this_rank_is_read():
    asked = []
    source = foreign("p", "a test", {"w": SAVED["w"]})
    read = source.read_box
    source.read_box = lambda *box: asked.append(box) or read(*box)
    part = shardckpt.ShardedArray(torch.zeros(2, 1).numpy(), (2, 3), (0, 2))
    load_source(
        {"w": part}, "p", attempt(lambda: source), SingleCoordinator(), strict=True, cast=False
    )
    assert asked == [("w", (0, 2), (2, 1))]


def test_dtypes_are_cast_only_when_allowed():
    state = {"w": torch.zeros(2, 3, dtype=torch.float64), "h": torch.zeros(2), "n": 0}
    with pytest.raises(errors.LoadMismatchError, match="dtype"):
        load(state)
    assert state["w"].sum() == 0
    report = load(state, cast=True)
    assert state["w"].sum() == 15
    assert {name for name, *_ in report.cast} == {"w", "h"}


def test_a_mismatch_changes_nothing_unless_the_load_is_not_strict():
    state = {"w": torch.zeros(9), "absent": torch.zeros(1), "n": 0}
    with pytest.raises(errors.LoadMismatchError) as raised:
        load(state)
    assert raised.value.path == "some/path"
    assert state["n"] == 0
    report = load(state, strict=False)
    assert (state["n"], state["w"].sum()) == (5, 0)
    assert report.missing == ("absent",)
    assert [name for name, *_ in report.wrong_shape] == ["w"]


def test_acceptable_mismatches_are_excused():
    state = {"w": torch.zeros(2, 3), "absent": torch.zeros(1)}
    saved = {"w": SAVED["w"]}
    report = load(state, saved, excuse=lambda found: found.missing.remove("absent"))
    assert state["w"].sum() == 15
    assert report.missing in ((), ("absent",))


def test_the_error_that_opening_raised_is_raised_by_the_load():
    def fail():
        raise errors.CheckpointNotFoundError("gone", path="some/path")

    state = {"w": torch.zeros(1)}
    with pytest.raises(errors.CheckpointNotFoundError, match="gone"):
        load_source(state, "p", attempt(fail), SingleCoordinator(), strict=True, cast=False)
