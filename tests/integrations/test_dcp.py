"""dcp.save, dcp.load and dcp.async_save with shardckpt's writer, reader and planners."""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import shardckpt
from shardckpt import errors
from shardckpt.integrations.dcp import (
    ReshardLoadPlanner,
    ShardReader,
    ShardSavePlanner,
    ShardWriter,
)
from tests.distributed import jobs
from tests.ranks import FSDP2_ON_CPU, join_group, on_world_sizes, run_ranks

pytestmark = pytest.mark.ranks


def a_state(scale: float = 1.0):
    return {
        "w": torch.arange(12.0).reshape(3, 4) * scale,
        "half": torch.ones(5, dtype=torch.bfloat16) * scale,
        "nested": {"list": [1, 2, torch.ones(3) * scale], "pair": (1, "b"), "bytes": b"x"},
    }


def zeros():
    return {
        "w": torch.zeros(3, 4),
        "half": torch.zeros(5, dtype=torch.bfloat16),
        "nested": {"list": [0, 0, torch.zeros(3)], "pair": (0, ""), "bytes": b""},
    }


def is_full(state) -> bool:
    expected = a_state()
    return (
        torch.equal(state["w"], expected["w"])
        and torch.equal(state["half"], expected["half"])
        and torch.equal(state["nested"]["list"][2], torch.ones(3))
        and state["nested"]["list"][:2] == [1, 2]
        and state["nested"]["pair"] == (1, "b")
        and state["nested"]["bytes"] == b"x"
    )


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


def test_checkpoint_ids_name_the_path(tmp_path):
    dcp.save(a_state(), checkpoint_id=tmp_path / "c", storage_writer=ShardWriter())
    state = zeros()
    dcp.load(state, checkpoint_id=tmp_path / "c", storage_reader=ShardReader())
    assert is_full(state)
    for call in (
        lambda: dcp.save(a_state(), storage_writer=ShardWriter()),
        lambda: dcp.load(zeros(), storage_reader=ShardReader()),
    ):
        with pytest.raises(CheckpointException, match="has no path"):
            call()


def test_metadata_has_the_ids_of_the_save_and_the_load(tmp_path):
    writer = ShardWriter(tmp_path / "c")
    assert writer.save_id is None
    dcp.save(a_state(), storage_writer=writer)
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        assert writer.save_id == checkpoint.manifest.checkpoint_id
    reader = ShardReader(tmp_path / "c")
    meta = reader.read_metadata().storage_meta
    assert str(meta.checkpoint_id) == str(tmp_path / "c")
    assert (meta.save_id, meta.load_id) == (writer.save_id, reader.load_id)
    before = reader.load_id
    reader.reset()
    assert reader.load_id != before


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


class Halves(dcp.DefaultLoadPlanner):
    """A user's planner: it changes what it has read."""

    def commit_tensor(self, read_item, tensor):
        tensor.div_(2)


def test_a_users_load_planner(tmp_path):
    shardckpt.save({"w": torch.full((3,), 4.0)}, tmp_path / "c")
    state = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=ShardReader(tmp_path / "c"), planner=Halves())
    assert state["w"].tolist() == [2, 2, 2]


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


@pytest.mark.skipif(
    "enable_plan_caching" not in inspect.signature(dcp.DefaultSavePlanner).parameters,
    reason="DCP of this torch has no cache of plans",
)
def test_the_cache_of_plans_is_refused(tmp_path):
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    with pytest.raises(CheckpointException, match="cache of plans"):
        dcp.save(a_state(), storage_writer=ShardWriter(tmp_path / "c"), planner=planner)
    assert not (tmp_path / "c").exists()


def async_saves(folder: str) -> list[bool]:
    found = []
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    for kind in (AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS):
        for planner in (None, ShardSavePlanner()):
            path = f"{folder}/{kind.name}{planner is None}"
            state = a_state()
            future = dcp.async_save(
                state,
                storage_writer=ShardWriter(path),
                planner=planner,
                async_checkpointer_type=kind,
            )
            state["w"].zero_()
            future.result(timeout=60)
            found.append(is_full(shardckpt.load_state(path)))
    return found


@pytest.mark.skipif(
    "async_checkpointer_type" not in inspect.signature(dcp.async_save).parameters,
    reason="dcp.async_save of this torch always uses a thread",
)
@pytest.mark.timeout(180)
def test_async_save_by_thread_and_process(tmp_path, monkeypatch):
    # The process that dcp starts makes a group of its own, by the launcher's variables.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    join_group(0, 1, store.port, name="parent")
    try:
        assert async_saves(str(tmp_path)) == [True] * 4
    finally:
        dist.destroy_process_group()


def save_and_load(size: int, folder: str, saved_on: int, own: bool) -> None:
    model, optimizer = jobs.build("fsdp", 3 if size == saved_on else 4)
    if size == saved_on:
        jobs.step(model, optimizer)
        whole = jobs.everything(model, optimizer)
        states = get_state_dict(model, optimizer)
        planner = ShardSavePlanner() if own else None
        dcp.save(
            {"model": states[0], "optimizer": states[1]},
            storage_writer=ShardWriter(f"{folder}/c"),
            planner=planner,
        )
        if dist.get_rank() == 0:
            torch.save(whole, f"{folder}/whole.pt")
        return
    states = get_state_dict(model, optimizer)
    state = {"model": states[0], "optimizer": states[1]}
    planner = ReshardLoadPlanner() if own else None
    dcp.load(state, storage_reader=ShardReader(f"{folder}/c"), planner=planner)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    found = jobs.everything(model, optimizer)
    expected = torch.load(f"{folder}/whole.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def reshard_with_dcp(folder: str, own: bool) -> None:
    on_world_sizes((3, 2, 1), save_and_load, folder, 3, own)


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="in this torch, FSDP2 needs GPUs")
@pytest.mark.parametrize("own", [False, True], ids=["dcp planners", "own planners"])
def test_resharding_through_dcp(tmp_path, own):
    run_ranks(3, reshard_with_dcp, str(tmp_path), own)


def no_collectives(folder: str) -> str:
    try:
        dcp.save(a_state(), storage_writer=ShardWriter(f"{folder}/c"), use_collectives=False)
    except (CheckpointException, errors.StateError) as error:
        return "use_collectives" in str(error)
    return "saved"


@pytest.mark.skipif(
    "use_collectives" not in inspect.signature(dcp.save).parameters,
    reason="dcp.save of this torch always uses collectives",
)
def test_saving_without_collectives_is_refused(tmp_path):
    assert run_ranks(2, no_collectives, str(tmp_path)) == [True, True]
    assert not (tmp_path / "c").exists()


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


def test_ranks_of_mpi_get_a_group_or_an_error(tmp_path, monkeypatch):
    """Each would take itself for the only rank, and save what it has as if that were all."""
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with pytest.raises(errors.DependencyError, match="mpi4py"):
        dcp.save({"w": torch.ones(2)}, storage_writer=ShardWriter(tmp_path / "c"))
    assert os.listdir(tmp_path) == []
