"""shardckpt.save with a planner of DCP."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

import shardckpt
from shardckpt import errors
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


def test_the_report_is_that_of_the_manifest(tmp_path):
    report = shardckpt.save(a_state(), tmp_path / "c", planner=shardckpt.ShardSavePlanner())
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        manifest = checkpoint.manifest
    assert (report.path, report.checkpoint_id) == (str(tmp_path / "c"), manifest.checkpoint_id)
    assert report.manifest_bytes == os.path.getsize(tmp_path / "c" / "manifest.json")
    assert report.bytes_by_rank == (sum(shard.size_bytes for shard in manifest.shards),)
    assert report.seconds.keys() == {"save"}


class Broken(dcp.DefaultSavePlanner):
    def create_local_plan(self):
        raise self.error


@pytest.mark.parametrize("error", [ValueError("a bug"), errors.CoverageError("holes", tensor="w")])
def test_an_error_of_a_planner_is_typed_and_names_the_rank(tmp_path, error):
    planner = Broken()
    planner.error = error
    with pytest.raises(errors.ShardckptError) as raised:
        shardckpt.save(a_state(), tmp_path / "c", planner=planner)
    if type(error) is ValueError:
        assert type(raised.value) is errors.RankFailedError
        assert (raised.value.path, raised.value.rank) == (str(tmp_path / "c"), (0,))
        assert raised.value.actual == "ValueError: a bug"
    else:
        assert (raised.value.tensor, raised.value.rank) == ("w", 0)
    assert os.listdir(tmp_path) == []


def test_a_save_that_fails_while_it_writes_leaves_nothing(tmp_path):
    class Failing(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item):
            raise OSError("planted")

    with pytest.raises(errors.RankFailedError, match="planner or a rank failed"):
        shardckpt.save(a_state(), tmp_path / "c", planner=Failing())
    assert os.listdir(tmp_path) == []


def test_replicas_are_compared_only_with_the_planner_of_shardckpt(tmp_path):
    with pytest.raises(errors.StateError, match="needs ShardSavePlanner") as raised:
        shardckpt.save(a_state(), tmp_path / "c", planner=Doubles(), check_replicas=True)
    assert raised.value.actual == "Doubles, which assigns each replica to one rank"
    with pytest.raises(errors.CoordinationError, match="do not support MPI"):
        shardckpt.save(a_state(), tmp_path / "c", planner=Doubles(), comm=object())
    assert os.listdir(tmp_path) == []
