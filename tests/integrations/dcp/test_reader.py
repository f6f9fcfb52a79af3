"""dcp.load with shardckpt's reader."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import shardckpt
from shardckpt import errors
from shardckpt.format.typed_json import TensorRef
from shardckpt.integrations.dcp import (
    ReshardLoadPlanner,
    ShardReader,
    ShardWriter,
)
from shardckpt.integrations.dcp.reader import dcp_entries
from tests.integrations.dcp.states import a_state, zeros

pytestmark = pytest.mark.ranks


def test_a_load_that_fails_keeps_its_typed_error(tmp_path):
    """DCP itself drops the first error of read_metadata."""
    for planner in (None, ReshardLoadPlanner()):
        with pytest.raises(CheckpointException) as caught:
            dcp.load(zeros(), storage_reader=ShardReader(tmp_path / "absent"), planner=planner)
        ((error, _),) = caught.value.failures.values()
        assert isinstance(error, errors.CheckpointNotFoundError)
        assert str(tmp_path / "absent") in str(error)


def test_dcp_without_a_reader_says_that_its_own_file_is_absent(tmp_path):
    dcp.save(a_state(), storage_writer=ShardWriter(tmp_path / "c"))
    with pytest.raises(CheckpointException, match="metadata"):
        dcp.load(zeros(), checkpoint_id=tmp_path / "c")


class Halves(dcp.DefaultLoadPlanner):
    """A user's planner: it changes what it has read."""

    def commit_tensor(self, read_item, tensor):
        tensor.div_(2)


def test_a_users_load_planner(tmp_path):
    shardckpt.save({"w": torch.full((3,), 4.0)}, tmp_path / "c")
    state = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=ShardReader(tmp_path / "c"), planner=Halves())
    assert state["w"].tolist() == [2, 2, 2]


def test_metadata_list_tensors_with_their_chunks_and_values(tmp_path):
    state = {"w": torch.arange(6.0).reshape(2, 3), "n": {"t": (1, 2)}, "e": {}, "s": torch.ones(())}
    shardckpt.save(state, tmp_path / "c")
    metadata = ShardReader(tmp_path / "c").read_metadata()
    described = metadata.state_dict_metadata
    assert described.keys() == {"w", "n.t", "s"}  # as DCP, which lists no empty dicts
    assert described["w"].size == (2, 3)
    assert described["w"].properties.dtype == torch.float32
    assert [(c.offsets, c.sizes) for c in described["w"].chunks] == [((0, 0), (2, 3))]
    assert [(c.offsets, c.sizes) for c in described["s"].chunks] == [((), ())]
    assert metadata.planner_data["n.t"] == ("n", "t")


def test_lists_without_tensors_are_one_value():
    ref = TensorRef("w", "tensor")
    tree = {"a": [1, [2]], "b": [1, ref], "c": [[ref], 2], "d": {}, 3: 4}
    assert dict(dcp_entries(tree, ())) == {
        ("a",): [1, [2]],
        ("b", 0): 1,
        ("b", 1): ref,
        ("c", 0, 0): ref,
        ("c", 1): 2,
        ("d",): {},
        ("3",): 4,
    }


def test_another_dtype_is_cast_only_when_asked(tmp_path):
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    state = {"w": torch.zeros(3, dtype=torch.float16)}
    with pytest.raises(CheckpointException, match="dtype") as raised:
        dcp.load(state, storage_reader=ShardReader(tmp_path / "c"))
    ((error, _),) = raised.value.failures.values()
    assert isinstance(error, errors.LoadMismatchError)
    assert state["w"].sum() == 0
    dcp.load(state, storage_reader=ShardReader(tmp_path / "c", dtype="cast"))
    assert state["w"].tolist() == [1, 1, 1]
    with pytest.raises(errors.StateError):
        ShardReader(tmp_path / "c", dtype="round")


def test_the_paths_of_readers_are_those_of_storages(tmp_path):
    assert ShardReader.validate_checkpoint_id("memory://bucket/c")
    assert not ShardReader.validate_checkpoint_id("")
    reader = ShardReader()
    with pytest.raises(errors.StateError, match="has no path"):
        reader.read_metadata()
    reader.reset(tmp_path / "c")
    assert reader.checkpoint_id == str(tmp_path / "c")


def test_a_state_with_an_empty_dict_is_loaded_by_the_default_planner(tmp_path):
    def a_state(lr):
        groups = [{"lr": lr, "momentum": torch.full((2,), lr)}, {"lr": lr}]
        return {"state": {}, "groups": groups}

    shardckpt.save(a_state(0.5), tmp_path / "c")
    state = a_state(0.1)
    dcp.load(state, storage_reader=ShardReader(tmp_path / "c"))
    assert str(state) == str(a_state(0.5))
