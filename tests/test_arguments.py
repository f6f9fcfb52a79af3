"""Every argument that is accepted has its effect; any other is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import shardckpt
from shardckpt import errors
from shardckpt.convert.convert import convert
from shardckpt.manager import CheckpointManager
from shardckpt.nn_handler import parallel
from shardckpt.nn_handler.saving import OneFile
from shardckpt.storage.local import LocalStorage
from tests.ranks import run_ranks


class Elsewhere(LocalStorage):
    """Keeps everything under another name than it is given."""

    def begin(self, path, **options):
        return super().begin(f"{path}-elsewhere", **options)

    def open(self, path):
        return super().open(f"{path}-elsewhere")


@pytest.mark.parametrize("planner", [None, shardckpt.ShardSavePlanner()], ids=["own", "dcp"])
def test_verify_base_needs_a_base(tmp_path, planner):
    state = {"w": torch.ones(3)}
    ways = {
        "save": lambda: shardckpt.save(state, tmp_path / "c", planner=planner, verify_base=True),
        "async_save": lambda: shardckpt.async_save(state, tmp_path / "c", verify_base=True),
        "ShardWriter": lambda: shardckpt.ShardWriter(tmp_path / "c", verify_base=True),
    }
    for way in ways.values():
        with pytest.raises(errors.StateError, match="leave verify_base out"):
            way()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("planner", [DefaultSavePlanner, shardckpt.ShardSavePlanner])
def test_a_planner_and_a_storage(tmp_path, planner):
    state = {"w": torch.ones(3)}
    report = shardckpt.save(state, tmp_path / "c", planner=planner(), storage=Elsewhere())
    assert [path.name for path in tmp_path.iterdir()] == ["c-elsewhere"]
    manifest = tmp_path / "c-elsewhere" / "manifest.json"
    assert report.manifest_bytes == manifest.stat().st_size
    assert torch.equal(shardckpt.load_state(tmp_path / "c", storage=Elsewhere())["w"], state["w"])


def replicas_with_planners(folder: str):
    state = {"w": torch.full((100_000,), float(dist.get_rank()))}
    found = []
    for planner in (shardckpt.ShardSavePlanner(), DefaultSavePlanner()):
        try:
            shardckpt.save(state, f"{folder}/c", planner=planner, check_replicas=True)
        except errors.StateError as error:
            found.append((type(error).__name__, error.tensor))
    return found


@pytest.mark.ranks
def test_a_planner_and_check_replicas(tmp_path):
    expected = [("ReplicaMismatchError", "w"), ("StateError", None)]
    assert run_ranks(2, replicas_with_planners, str(tmp_path)) == [expected] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_can_t_compare_replicas(tmp_path):
    writer = shardckpt.ShardWriter(tmp_path / "c", check_replicas=True)
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.save({"w": torch.ones(2)}, storage_writer=writer)
    ((error, _),) = caught.value.failures.values()
    assert isinstance(error, errors.StateError)


def test_a_reader_that_casts_with_any_planner(tmp_path):
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    for planner in (None, shardckpt.ReshardLoadPlanner()):
        state = {"w": torch.zeros(3, dtype=torch.float64)}
        reader = shardckpt.ShardReader(tmp_path / "c", dtype="cast")
        dcp.load(state, storage_reader=reader, planner=planner)
        assert state["w"].tolist() == [1, 1, 1]


def test_a_planner_without_options():
    with pytest.raises(errors.StateError, match="no options"):
        shardckpt.ShardSavePlanner(dedup_save_to_lowest_rank=True)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("c", {"file_bytes": 1 << 20}),
        ("c.pth", {"shards": 2}),
        ("c.safetensors", {"file_bytes": 1 << 20}),
        ("c.safetensors", {"shards": 2}),
        ("c", {"to": "hf", "shards": 2}),
        ("c", {"to": "dcp", "file_bytes": 1 << 20}),
    ],
)
def test_options_that_a_target_has_no_use_for(tmp_path, target, options):
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "source")
    with pytest.raises(errors.StateError, match="has no number of shards or size of files"):
        convert(str(tmp_path / "source"), str(tmp_path / target), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_manager_s_choices(tmp_path):
    manager = CheckpointManager(tmp_path)
    with pytest.raises(errors.StateError, match="if_exists"):
        manager.save(1, {"a": 1}, if_exists="ignore")
    with pytest.raises(errors.StateError, match="mode"):
        manager.restore_best({"a": 1}, "loss", "best")
    files = CheckpointManager(tmp_path, name="{step}.pth", backend=OneFile(), asynchronous=True)
    with pytest.raises(errors.StateError, match="background"):
        files.save(1, {"a": 1, "ranks": shardckpt.PerRank(0)})
    assert list(tmp_path.iterdir()) == []


def test_a_tp_plan_without_its_mesh():
    with pytest.raises(errors.StateError, match="mesh"):
        parallel.join_ranks("none", None, None, {"0": None})


@pytest.mark.parametrize("take", [shardckpt.ShardReader, shardckpt.ReshardLoadPlanner])
def test_an_unknown_dtype_policy_is_refused(tmp_path, take):
    shardckpt.save({"w": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(errors.StateError, match="dtype"):
        take(dtype="bf16")
    with pytest.raises(errors.StateError, match="dtype"):
        shardckpt.load({"w": torch.ones(2)}, tmp_path / "c", dtype="bf16")
