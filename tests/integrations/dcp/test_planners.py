"""The planners of shardckpt and those of DCP plan saves and loads."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

import shardckpt
from shardckpt import errors
from shardckpt.integrations.dcp import (
    ReshardLoadPlanner,
    ShardReader,
    ShardSavePlanner,
    ShardWriter,
    planners,
)
from shardckpt.integrations.dcp.planners import ShardMetadata, UnreadableMetadata
from tests.integrations.dcp.states import a_state, is_full, zeros

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("save_planner", [None, ShardSavePlanner])
@pytest.mark.parametrize("load_planner", [None, ReshardLoadPlanner])
def test_planners_of_both_kinds(tmp_path, save_planner, load_planner):
    writer = ShardWriter(tmp_path / "c")
    dcp.save(a_state(), storage_writer=writer, planner=save_planner and save_planner())
    shardckpt.open_checkpoint(tmp_path / "c").verify()
    state = zeros()
    dcp.load(
        state, storage_reader=ShardReader(tmp_path / "c"), planner=load_planner and load_planner()
    )
    assert is_full(state)
    assert is_full(shardckpt.load_state(tmp_path / "c"))
    own = zeros()
    shardckpt.load(own, tmp_path / "c")
    assert is_full(own)


def test_partial_loads_and_casts(tmp_path):
    shardckpt.save({"w": torch.ones(3), "more": 1}, tmp_path / "c")
    state = {"w": torch.zeros(3, dtype=torch.float64), "absent": torch.zeros(2)}
    planner = ReshardLoadPlanner(allow_partial_load=True, dtype="cast")
    dcp.load(state, storage_reader=ShardReader(tmp_path / "c"), planner=planner)
    assert state["w"].tolist() == [1, 1, 1]
    for options in ({}, {"allow_partial_load": True}):
        target = {"w": torch.zeros(3), **({"absent": torch.zeros(2)} if not options else {})}
        if options:
            dcp.load(
                target,
                storage_reader=ShardReader(tmp_path / "c"),
                planner=ReshardLoadPlanner(**options),
            )
            continue
        with pytest.raises(CheckpointException, match="absent"):
            dcp.load(
                target, storage_reader=ShardReader(tmp_path / "c"), planner=ReshardLoadPlanner()
            )
    cast = {"w": torch.zeros(3, dtype=torch.float64)}
    dcp.load(cast, storage_reader=ShardReader(tmp_path / "c", dtype="cast"))
    assert cast["w"].tolist() == [1, 1, 1]


def test_partners_of_another_kind_are_refused(tmp_path):
    with pytest.raises(CheckpointException, match="ShardWriter"):
        dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "x", planner=ShardSavePlanner())
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "c")
    with pytest.raises(CheckpointException, match="ShardReader"):
        dcp.load({"w": torch.ones(2)}, checkpoint_id=tmp_path / "c", planner=ReshardLoadPlanner())
    with pytest.raises(errors.NotACheckpointError, match=r"torch\.distributed\.checkpoint"):
        shardckpt.load_state(tmp_path / "c")


@pytest.mark.parametrize("own", [False, True], ids=["dcp planner", "own planner"])
def test_counters_and_int_keys_through_dcp(tmp_path, own):
    """DCP's planner takes a Counter apart, which is one value to shardckpt."""
    shardckpt.save({"s": {"milestones": Counter([2, 2, 4]), "d": {1: 5}}}, tmp_path / "c")
    state = {"s": {"milestones": Counter([2, 4]), "d": {1: 0}}}
    planner = ReshardLoadPlanner() if own else None
    dcp.load(state, storage_reader=ShardReader(tmp_path / "c"), planner=planner)
    if own:
        assert state == {"s": {"milestones": Counter([2, 2, 4]), "d": {1: 5}}}
    else:  # whose planner makes texts of int keys
        assert state["s"]["milestones"]["2"] == 2
        assert state["s"]["d"]["1"] == 5


def test_planners_need_the_partner_of_shardckpt():
    for planner, metadata, partner in (
        (ShardSavePlanner(), StorageMeta(), "ShardWriter"),
        (ReshardLoadPlanner(), Metadata({}), "ShardReader"),
        (ReshardLoadPlanner(), ShardMetadata({}), "ShardReader"),
    ):
        with pytest.raises(errors.StateError, match=f"{type(planner).__name__} needs") as raised:
            planner.set_up_planner({}, metadata)
        assert raised.value.expected == f"shardckpt.{partner}"


def test_options_of_dcp_are_refused():
    with pytest.raises(errors.StateError, match="takes no options") as raised:
        ShardSavePlanner(flatten_state_dict=False)
    assert raised.value.actual == "flatten_state_dict"
    with pytest.raises(errors.StateError):
        ReshardLoadPlanner(dtype="round")


def test_metadata_that_could_not_be_read_raise_their_error_at_each_use():
    error = errors.CorruptionError("planted")
    metadata = UnreadableMetadata(error)
    for name in ("state_dict_metadata", "saved", "planner_data"):
        with pytest.raises(errors.CorruptionError) as raised:
            getattr(metadata, name)
        assert raised.value is error


def test_a_rank_that_saves_and_loads_alone_has_the_values_of_its_markers(tmp_path, monkeypatch):
    second_of_two = SimpleNamespace(
        is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2
    )
    monkeypatch.setattr(planners, "dist", second_of_two)
    state = {"own": shardckpt.PerRank(5), "common": shardckpt.FromRank0(6)}
    writer = shardckpt.ShardWriter(tmp_path / "c")
    dcp.save(state, storage_writer=writer, planner=shardckpt.ShardSavePlanner())
    assert shardckpt.load_state(tmp_path / "c") == {"own": [5], "common": 6}
    state = {"own": shardckpt.PerRank(0), "common": shardckpt.FromRank0(0)}
    reader = shardckpt.ShardReader(tmp_path / "c")
    planner = shardckpt.ReshardLoadPlanner()
    dcp.load(state, storage_reader=reader, planner=planner)
    assert (state["own"].value, state["common"].value) == (5, 6)
