"""The markers of entries that differ by rank."""

from __future__ import annotations

import dataclasses

import pytest

from shardckpt.errors import StateError
from shardckpt.state.markers import FromRank0, PerRank, Union


def test_a_per_rank_value_is_kept_for_another_number_of_ranks_by_default():
    assert PerRank(7) == PerRank(7, "keep")
    assert PerRank(7) != PerRank(7, "wrap")


@pytest.mark.parametrize("marker", [PerRank(1), Union({}), FromRank0(1)])
def test_a_marker_can_not_be_changed(marker):
    with pytest.raises(dataclasses.FrozenInstanceError):
        marker.value = 2


def test_an_unknown_rule_is_refused():
    with pytest.raises(StateError, match="on_resize"):
        PerRank(1, on_resize="warp")
