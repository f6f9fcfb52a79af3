"""The ranks that take part in an operation."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import shardckpt
from shardckpt.coordination import resolve
from shardckpt.coordination.mpi.launch import Launch
from shardckpt.coordination.resolve import alone, check_launcher, is_alone, operation
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import CoordinationError


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of rank 1 of 4 of torchrun."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")


def test_a_process_that_no_launcher_started_is_the_only_rank():
    made = operation("save a")
    assert (made.rank, made.world_size) == (0, 1)
    with made as coordinator:
        assert isinstance(coordinator, SingleCoordinator)


def test_a_rank_of_torchrun_without_a_group_is_refused(torchrun):
    with pytest.raises(CoordinationError, match="one of several ranks") as caught:
        operation("save a")
    assert caught.value.rank == 1
    assert caught.value.actual == "RANK=1 and WORLD_SIZE=4, without a group"
    assert "init_process_group" in caught.value.remedy


def test_inside_alone_a_rank_of_torchrun_is_the_only_rank(torchrun):
    with alone():
        assert is_alone()
        assert operation("save a").world_size == 1
        check_launcher()
    assert not is_alone()
    with pytest.raises(ZeroDivisionError), alone():
        raise ZeroDivisionError
    assert not is_alone()


def test_a_group_of_one_rank_needs_no_store(torchrun):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with operation("save a") as coordinator:
            assert isinstance(coordinator, SingleCoordinator)
    finally:
        dist.destroy_process_group()


def test_a_communicator_and_a_group_exclude_each_other():
    with pytest.raises(CoordinationError, match="Both a communicator and a process group"):
        operation("save a", object(), comm=object())


def test_a_group_without_torch_distributed_is_refused(tmp_path):
    with pytest.raises(CoordinationError, match="not initialized"):
        operation("save a", object())
    with pytest.raises(CoordinationError, match="not initialized"):
        shardckpt.save({"a": 1}, tmp_path / "c", process_group=object())


def test_tasks_of_srun_that_nothing_connects_are_refused(monkeypatch):
    launch = Launch(rank=1, world_size=4, local_rank=1, launcher="srun")
    monkeypatch.setattr(resolve, "several_ranks", lambda: launch)
    monkeypatch.setattr(resolve, "mpi_launch", lambda: None)
    monkeypatch.setattr(resolve.sys, "modules", {})
    with pytest.raises(CoordinationError, match="srun started several tasks") as caught:
        operation("save a")
    assert caught.value.actual == "4 tasks, without either"
    assert "init_from_mpi" in caught.value.remedy
