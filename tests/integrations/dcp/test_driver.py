"""shardckpt.save with a planner of DCP."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

import shardckpt
from shardckpt.integrations.dcp import (
    ShardWriter,
)
from tests.integrations.dcp.states import a_state

pytestmark = pytest.mark.ranks


class Doubles(dcp.DefaultSavePlanner):
    """A user's planner: it transforms what it saves."""

    def transform_object(self, write_item, object_):
        made = super().transform_object(write_item, object_)
        return made * 2 if isinstance(made, torch.Tensor) else made


def test_a_users_planner(tmp_path):
    report = shardckpt.save(a_state(), tmp_path / "own", planner=Doubles())
    assert report.bytes_by_rank == (
        os.path.getsize(tmp_path / "own" / "shard-00000-of-00001.safetensors"),
    )
    dcp.save(a_state(), storage_writer=ShardWriter(tmp_path / "dcp"), planner=Doubles())
    for name in ("own", "dcp"):
        assert torch.equal(shardckpt.load_state(tmp_path / name)["w"], a_state(2)["w"])
