"""dcp.load with shardckpt's reader."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import shardckpt
from shardckpt import errors
from shardckpt.integrations.dcp import (
    ReshardLoadPlanner,
    ShardReader,
    ShardWriter,
)
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
