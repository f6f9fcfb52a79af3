"""dcp.save and dcp.async_save with shardckpt's writer."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import io
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

import shardckpt
from shardckpt import errors
from shardckpt.integrations.dcp import (
    ShardReader,
    ShardSavePlanner,
    ShardWriter,
)
from shardckpt.integrations.dcp.writer import _nest, _union, _value, _Written
from shardckpt.plan.local_plan import ChunkTable, TensorSpec, pad_boxes
from tests.integrations.dcp.states import a_state, is_full, zeros
from tests.ranks import join_group, run_ranks

pytestmark = pytest.mark.ranks


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


def test_ranks_of_mpi_get_a_group_or_an_error(tmp_path, monkeypatch):
    """Each would take itself for the only rank, and save what it has as if that were all."""
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with pytest.raises(errors.DependencyError, match="mpi4py"):
        dcp.save({"w": torch.ones(2)}, storage_writer=ShardWriter(tmp_path / "c"))
    assert os.listdir(tmp_path) == []


class Twice(dcp.DefaultSavePlanner):
    """Each rank writes each item twice."""

    def finish_plan(self, new_plan):
        plan = super().finish_plan(new_plan)
        self.plan = dataclasses.replace(plan, items=[*plan.items, *plan.items])
        return self.plan


def test_a_chunk_that_a_planner_writes_twice_is_refused(tmp_path):
    with pytest.raises(errors.CoverageError, match="several times") as raised:
        shardckpt.save({"w": torch.ones(2, 3)}, tmp_path / "c", planner=Twice())
    assert raised.value.tensor == "w"
    assert raised.value.actual == "2 times offsets [0, 0], sizes [2, 3]"
    assert os.listdir(tmp_path) == []


def test_two_ranks_that_write_a_tensor_of_different_dtypes_are_refused():
    table = ChunkTable(tensor=np.array([0]), boxes=pad_boxes([((0,), (2,))]))
    written = [
        _Written(None, (TensorSpec("w", dtype, (2,)),), table.pack(), {})
        for dtype in ("F32", "F32", "F16")
    ]
    with pytest.raises(errors.RankMismatchError, match="different dtypes or shapes") as raised:
        _union(written, None)
    assert (raised.value.rank, raised.value.tensor) == (2, "w")
    assert (raised.value.expected, raised.value.actual) == ("F32 [2]", "F16 [2]")


class Mark:
    """A class that torch.load(weights_only=True) refuses."""


def test_a_value_of_a_planner_is_read_without_pickle_or_looked_up():
    def bytes_of(value):
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream

    item = WriteItem(MetadataIndex("n.x"), WriteItemType.BYTE_IO)
    assert _value(SimpleNamespace(resolve_data=lambda item: bytes_of((1, 2.5))), item) == {
        "$tuple": [1, 2.5]
    }
    with pytest.raises(errors.UnsupportedLeafError, match="without pickle") as raised:
        _value(SimpleNamespace(resolve_data=lambda item: bytes_of(Mark())), item)
    assert raised.value.tensor == "n.x"
    looked_up = SimpleNamespace(
        resolve_data=lambda item: bytes_of(Mark()), lookup_object=lambda index: [7]
    )
    assert _value(looked_up, item) == [7]


def test_values_are_nested_by_their_paths():
    paths = {"a.0": ("a", 0), "a.2": ("a", 2), "b.x": ("b", "x"), "b.1": ("b", 1), "c": ("c",)}
    leaves = {"a.0": 1, "a.2": 3, "b.x": 4, "b.1": 5, "c": {"$tuple": []}, "d.e": 6}
    assert _nest(leaves, paths) == {
        "a": [1, None, 3],
        "b": {"$dict": [["x", 4], [1, 5]]},
        "c": {"$tuple": []},
        "d.e": 6,
    }


def test_the_paths_of_writers_are_those_of_storages(tmp_path):
    assert ShardWriter.validate_checkpoint_id(tmp_path / "c")
    assert ShardWriter.validate_checkpoint_id("memory://bucket/c")
    assert not ShardWriter.validate_checkpoint_id("")
    with pytest.raises(errors.StateError, match="has no path") as raised:
        ShardWriter().set_up_storage_writer(True, rank=3)
    assert raised.value.rank == 3


def test_an_abandoned_writer_leaves_nothing(tmp_path):
    for end in (lambda writer: writer.abandon(), lambda writer: None):
        writer = ShardWriter(tmp_path / "c")
        writer.prepare_global_plan([dcp.SavePlan([])])
        assert os.listdir(tmp_path) != []
        end(writer)
        del writer
        gc.collect()
        assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_a_save_that_failed_on_another_rank_is_repeated_while_its_writer_exists(
    tmp_path, monkeypatch
):
    def save(writer):
        dcp.save({"weight": torch.ones(2)}, storage_writer=writer)

    failed = ShardWriter(tmp_path / "a")
    with monkeypatch.context() as patched:
        patched.setattr(failed, "finish", lambda *results: 1 / 0)  # DCP does not call it
        with pytest.raises(CheckpointException):
            save(failed)
    save(ShardWriter(tmp_path / "a"))
    assert os.listdir(tmp_path) == ["a"]
    failed.abandon()
    shardckpt.verify(tmp_path / "a")


class Pickled(dcp.DefaultSavePlanner):
    """Encodes values in a format of its own."""

    def transform_object(self, write_item, object):
        return io.BytesIO(b"own " + bytes([object]))


@pytest.mark.parametrize(
    ("planner", "state", "message"),
    [
        (Pickled(), {"n": 5}, "can't be saved without pickle"),
        (dcp.DefaultSavePlanner(), {"pair": (torch.ones(2), 1)}, "a part of a value"),
        (
            dcp.DefaultSavePlanner(flatten_state_dict=False),
            {"model": {"weight": torch.ones(2)}},
            "a part of a value",
        ),
    ],
)
def test_values_that_a_planner_encodes_in_another_way_are_refused(
    tmp_path, planner, state, message
):
    with pytest.raises(CheckpointException, match=message) as raised:
        dcp.save(state, storage_writer=ShardWriter(tmp_path / "c"), planner=planner)
    ((error, _),) = raised.value.failures.values()
    assert isinstance(error, errors.UnsupportedLeafError)


def test_a_save_after_a_failed_one_in_the_same_process_may_have_the_same_path(tmp_path):
    class Failing(ShardWriter):
        def finish(self, metadata, results):
            raise OSError("no space left on device")

    writer = Failing(tmp_path / "c")
    with pytest.raises(CheckpointException):
        dcp.save(a_state(), storage_writer=writer)
    with pytest.raises(CheckpointException, match="no space"):
        dcp.save(a_state(), storage_writer=writer)
    writer.itself = writer  # a cycle, as errors and tracebacks make
    del writer
    dcp.save(a_state(), storage_writer=ShardWriter(tmp_path / "c"))
    assert shardckpt.verify(tmp_path / "c")
