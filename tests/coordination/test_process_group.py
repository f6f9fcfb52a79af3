"""A process group of torch is started from the ranks of MPI or SLURM."""

from __future__ import annotations

import datetime
import os
import socket
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import shardckpt
from shardckpt import errors
from shardckpt.coordination import process_group
from shardckpt.coordination.mpi.launch import Launch
from shardckpt.coordination.process_group import group_for_dcp, init_from_mpi

pytestmark = pytest.mark.usefixtures("launched_by")


def test_init_from_mpi_outside_of_mpi():
    with pytest.raises(errors.CoordinationError, match="Neither mpirun nor srun"):
        shardckpt.init_from_mpi()


@pytest.fixture
def environment(monkeypatch):
    """The variables of torchrun are restored after the test."""
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in (*variables, "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return os.environ


@pytest.fixture
def interfaces(monkeypatch):
    """Two networks and the loopback; the name of the host belongs to the second one."""
    found = [("lo", "127.0.0.1"), ("eth0", "10.0.0.1"), ("ib0", "10.1.0.1")]
    monkeypatch.setattr(process_group, "_interfaces", lambda: found)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.1.0.1")


def test_nothing_happens_if_there_is_a_group(monkeypatch, environment):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    init_from_mpi()
    assert "RANK" not in environment


def test_dcp_takes_no_communicator():
    with pytest.raises(errors.CoordinationError, match="do not support MPI") as raised:
        group_for_dcp("run/c", comm=object())
    assert raised.value.path == "run/c"
    assert "init_from_mpi(comm=...)" in raised.value.remedy


def test_dcp_gets_a_group_only_if_a_launcher_started_several_ranks(monkeypatch, launched_by):
    begun = []
    monkeypatch.setattr(process_group, "init_from_mpi", lambda: begun.append(1))
    group_for_dcp("run/c")
    assert begun == []
    launched_by({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"})
    group_for_dcp("run/c")
    assert begun == [1]


def test_the_address_of_the_store_numbers_the_ranks_of_each_host(interfaces, environment):
    store = SimpleNamespace(port=7)
    address = process_group._store_address(store, [b"a", b"b", b"a", b"b", b"b"])
    assert address.hosts == ["10.1.0.1", "10.0.0.1"]  # that of the name of the host comes first
    assert (address.port, address.local_ranks, address.one_host) == (7, [0, 0, 1, 1, 2], False)
    environment["MASTER_ADDR"] = "head"
    address = process_group._store_address(store, [b"a", b"a"])
    assert (address.hosts, address.local_ranks, address.one_host) == (["head"], [0, 1], True)


def test_hosts_and_containers_have_ids_of_their_own(interfaces, monkeypatch):
    before = process_group._host_id()
    assert process_group._host_id() == before
    monkeypatch.setattr(process_group, "_interfaces", lambda: [("eth0", "10.0.0.2")])
    assert process_group._host_id() != before


def test_the_first_address_that_answers_is_taken_and_its_network_used(interfaces, environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hosts = ["127.0.0.1", "10.0.0.9"]
        assert process_group._reachable(hosts, port, one_host=False) == "127.0.0.1"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_rank_that_can_not_reach_rank_0_is_an_error(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for hosts, named in ((["127.0.0.1"], "127.0.0.1"), ([], "its host")):
        with pytest.raises(errors.CoordinationError, match="can't reach rank 0") as raised:
            process_group._reachable(hosts, port, one_host=True)
        assert raised.value.expected == f"an answer at port {port} of {named}"
        assert "MASTER_ADDR" in raised.value.remedy


def test_ranks_of_slurm_meet_at_a_port_of_their_job_and_step(monkeypatch, environment):
    monkeypatch.setenv("SLURM_JOB_ID", "1000")
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    opened = []
    monkeypatch.setattr(
        process_group, "_store", lambda host, port, **options: opened.append((host, port))
    )
    for rank in (0, 1):
        launch = Launch(launcher="srun", rank=rank, world_size=2, local_rank=rank, host="gpu07")
        process_group._slurm_store(launch)
        exported = [environment[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
        assert exported == [str(rank), "2", str(rank), "gpu07"]
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    port = 20_000 + (1000 * 64 + 3) % 12_000
    assert opened == [("0.0.0.0", port), ("gpu07", port)]


def test_a_task_of_slurm_without_rank_0_fails_in_time(monkeypatch, environment):
    waits = []

    def fail(host, port, *, timeout, **options):
        waits.append(timeout)
        raise dist.DistError("nobody\nanswers")

    monkeypatch.setattr(process_group, "_store", fail)
    launch = Launch(launcher="srun", rank=1, world_size=2, local_rank=1, host="gpu07")
    with (
        shardckpt.options(arrival_deadline_s=7),
        pytest.raises(errors.RankFailedError) as raised,
    ):
        process_group._slurm_store(launch)
    assert waits == [datetime.timedelta(seconds=7)]
    assert (raised.value.rank, raised.value.actual) == ((0,), "nobody")


@pytest.mark.parametrize(("port", "expected"), [(0, "a free port"), (29500, "port 29500 to be")])
def test_a_port_that_is_taken_is_named(monkeypatch, port, expected):
    def fail(*arguments, **options):
        raise dist.DistError("address in use\nand more")

    monkeypatch.setattr(process_group, "_store", fail)
    with pytest.raises(errors.CoordinationError, match="can't open its store") as raised:
        process_group._serve(port)
    assert raised.value.expected.startswith(expected)
    assert (raised.value.rank, raised.value.actual) == (0, "address in use")


def test_psutil_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(errors.DependencyError, match="psutil") as raised:
        process_group._interfaces()
    assert raised.value.remedy == 'pip install "shardckpt[mpi]"'
