"""The ten faults that default DCP commits in silence: through shardckpt's own driver, and through
dcp.save and dcp.load with shardckpt's classes."""

from __future__ import annotations

import errno
import os
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardckpt
from shardckpt import errors
from shardckpt.integrations.dcp import (
    ReshardLoadPlanner,
    ShardReader,
    ShardSavePlanner,
    ShardWriter,
)
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import System
from tests.ranks import run_ranks


def cause(failure: CheckpointException) -> Exception:
    """The error that a rank raised inside dcp.save or dcp.load."""
    return next(iter(failure.failures.values()))[0]


class Own:
    """shardckpt.save and shardckpt.load."""

    planners = (None,)

    @staticmethod
    def save(state, path, *, planner=None, **options):
        shardckpt.save(state, path, **options)

    @staticmethod
    def load(state, path, **options):
        shardckpt.load(state, path)


class Dcp:
    """dcp.save and dcp.load; with the planners that they bring, or with shardckpt's."""

    def __init__(self, own_planners: bool) -> None:
        self.own_planners = own_planners

    def save(self, state, path, **options):
        writer = ShardWriter(path, **options)
        planner = ShardSavePlanner() if self.own_planners else None
        try:
            dcp.save(state, storage_writer=writer, planner=planner)
        except CheckpointException as failure:
            raise cause(failure) from None
        finally:
            writer.abandon()

    def load(self, state, path):
        planner = ReshardLoadPlanner() if self.own_planners else None
        reader = ShardReader(path)
        try:
            dcp.load(state, storage_reader=reader, planner=planner)
        except CheckpointException as failure:
            raise cause(failure) from None


WAYS = {"own": Own(), "dcp": Dcp(own_planners=False), "dcp-planners": Dcp(own_planners=True)}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
keeps_nesting = pytest.mark.parametrize(
    "way", [WAYS["own"], WAYS["dcp-planners"]], ids=["own", "dcp-planners"]
)


def a_state():
    return {"w": torch.arange(600_000.0), "step": 3}


class WritesFail(System):
    def write(self, fd, data, *, offset):
        if len(data) > 1 << 20:
            raise OSError(errno.EIO, "planted")
        return super().write(fd, data, offset=offset)


@every_way
def test_1_an_error_in_a_writer_thread(way, tmp_path):
    state = {"w": torch.zeros(6 << 20)}  # several buffers, written by threads
    with pytest.raises(errors.StorageError) as caught:
        way.save(state, tmp_path / "c", storage=LocalStorage(WritesFail()))
    assert caught.value.errno == errno.EIO
    assert os.listdir(tmp_path) == []


@every_way
def test_2_a_flipped_bit(way, tmp_path):
    way.save(a_state(), tmp_path / "c")
    shard = tmp_path / "c" / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[1_500_000] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(errors.CorruptionError) as caught:
        way.load({"w": torch.zeros(600_000), "step": 0}, tmp_path / "c")
    assert caught.value.tensor == "w"


class LeavesOut(dcp.DefaultSavePlanner):
    """A planner with a fault: it forgets what the last rank holds."""

    def create_global_plan(self, all_plans):
        plans, metadata = super().create_global_plan(all_plans)
        return [*plans[:-1], dcp.SavePlan([], planner_data=plans[-1].planner_data)], metadata


class WritesTwice(dcp.DefaultSavePlanner):
    """A planner with a fault: it writes everything twice."""

    def create_global_plan(self, all_plans):
        plans, metadata = super().create_global_plan(all_plans)
        return [
            dcp.SavePlan([*plan.items, *plan.items], planner_data=plan.planner_data)
            for plan in plans
        ], metadata


def save_with_faulty_planners(folder):
    mesh = init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.arange(10.0), mesh, [Shard(0)])
    found = []
    for number, planner in enumerate((LeavesOut(), WritesTwice())):
        for way in ("own", "dcp"):
            path = f"{folder}/{number}{way}"
            try:
                if way == "own":
                    shardckpt.save({"w": tensor}, path, planner=planner)
                else:
                    dcp.save({"w": tensor}, storage_writer=ShardWriter(path), planner=planner)
            except CheckpointException as failure:
                found.append(cause(failure))
            except errors.ShardckptError as error:
                found.append(error)
    return [(type(error).__name__, error.tensor) for error in found]


def test_3_holes_and_overlaps(tmp_path):
    for results in run_ranks(2, save_with_faulty_planners, str(tmp_path)):
        assert results == [("CoverageError", "w")] * 4
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(".")]


@every_way
def test_4_another_dtype(way, tmp_path):
    way.save(a_state(), tmp_path / "c")
    target = torch.zeros(600_000, dtype=torch.float16)
    with pytest.raises(errors.LoadMismatchError) as caught:
        way.load({"w": target, "step": 0}, tmp_path / "c")
    assert caught.value.facts["wrong_dtype"] == (("w", "torch.float16", "torch.float32"),)
    assert not target.any()


def save_what_differs(folder, own_planners):
    way = Dcp(own_planners=True) if own_planners else Own()
    rank, found = dist.get_rank(), []
    for number, state in enumerate(({"t": torch.full((3,), float(rank))}, {"v": [1, rank]})):
        try:
            way.save(state, f"{folder}/{number}")
        except errors.ReplicaMismatchError as error:
            found.append(error.tensor)
    return found


@pytest.mark.parametrize("own_planners", [False, True], ids=["own", "dcp-planners"])
def test_5_ranks_that_differ(tmp_path, own_planners):
    assert run_ranks(2, save_what_differs, str(tmp_path), own_planners) == [["t", "v.1"]] * 2
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(".")]


@keeps_nesting
def test_6_int_keys_and_empty_containers(way, tmp_path):
    state = {"d": {1: torch.ones(2), "1x": 2, "empty": {}, "list": [], (3, "k"): 4}, "e": {}}
    way.save(state, tmp_path / "c")
    found = shardckpt.load_state(tmp_path / "c")
    assert list(found["d"]) == list(state["d"])
    assert found["d"]["empty"] == {}
    assert found["d"]["list"] == []
    assert found["e"] == {}
    target = {"d": {1: torch.zeros(2), "1x": 0, "empty": {}, "list": [], (3, "k"): 0}, "e": {}}
    way.load(target, tmp_path / "c")
    assert target["d"][1].tolist() == [1, 1]
    assert target["d"][3, "k"] == 4


@every_way
def test_7_ties_and_views(way, tmp_path):
    storage = torch.zeros(1 << 20)
    shown = storage[:100]
    state = {"a": shown, "view": storage[::1000][:50]}
    if way is not WAYS["dcp"]:
        state["tied"] = shown
    way.save(state, tmp_path / "c")
    size = (tmp_path / "c" / "shard-00000-of-00001.safetensors").stat().st_size
    assert size == 4096 + 400 + 200
    found = shardckpt.load_state(tmp_path / "c")
    assert found.get("tied", found["a"]) is found["a"]


class RenamesFail(System):
    def exchange(self, one, other):
        raise OSError(errno.EIO, "planted")


@every_way
def test_8_overwriting_keeps_the_old_one(way, tmp_path):
    way.save(a_state(), tmp_path / "c")
    for system in (WritesFail(), RenamesFail()):
        with pytest.raises(errors.StorageError):
            way.save(
                {"w": torch.ones(600_000), "step": 4},
                tmp_path / "c",
                overwrite=True,
                storage=LocalStorage(system),
            )
        assert shardckpt.load_state(tmp_path / "c")["step"] == 3
    way.save({"w": torch.ones(600_000), "step": 4}, tmp_path / "c", overwrite=True)
    assert shardckpt.load_state(tmp_path / "c")["step"] == 4
    assert os.listdir(tmp_path) == ["c"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


_found: list[object] | None = None


@pytest.fixture
def unpickled():
    """Names that pickle looked up in the test."""
    global _found  # an audit hook is for ever
    if _found is None:

        def hook(event, arguments):
            if event == "pickle.find_class" and _found is not None:
                _found.append(arguments)

        sys.addaudithook(hook)
    _found = []
    return _found


@every_way
def test_9_nothing_is_unpickled(way, tmp_path, unpickled, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((errors.UnsupportedLeafError, AttributeError)) as caught:
        way.save({"w": torch.ones(2), "x": Evil()}, tmp_path / "evil")
    assert not (tmp_path / "evil").exists()
    assert "x" in str(caught.value)
    way.save(a_state(), tmp_path / "c")
    way.load({"w": torch.zeros(600_000), "step": 0}, tmp_path / "c")
    assert unpickled == [] or way is WAYS["dcp"]
    assert not (tmp_path / "pwned").exists()


@every_way
def test_10_the_tensor_without_dimensions(way, tmp_path):
    import safetensors.torch

    way.save({"s": torch.tensor(5.0), "t": torch.tensor(True)}, tmp_path / "c")
    held = safetensors.torch.load_file(tmp_path / "c" / "shard-00000-of-00001.safetensors")
    assert held["s"].shape == ()
    assert held["s"].item() == 5.0
    target = {"s": torch.tensor(0.0), "t": torch.tensor(False)}
    way.load(target, tmp_path / "c")
    assert target["s"].item() == 5.0
    assert target["t"].item() is True


def test_default_dcp_does_commit_such_faults(tmp_path):
    """The checks above can fail: dcp's own storage loads a flipped bit and casts in silence."""
    dcp.save(a_state(), checkpoint_id=tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x10
    shard.write_bytes(data)
    target = {"w": torch.zeros(600_000, dtype=torch.float64), "step": 0}
    dcp.load(target, checkpoint_id=tmp_path / "c")
    assert not torch.equal(target["w"].float(), a_state()["w"])
    shutil.rmtree(tmp_path / "c")
