"""Several nodes: torchrun over c10d and mpirun over hosts; network namespaces stand for them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import shardckpt
from tests.mpi.hosts import ADDRESSES, INTERFACE, needs_hosts, torchrun, two_hosts
from tests.mpi.launch import environment, needs, run_job

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]


@pytest.fixture
def hosts(tmp_path):
    needs_hosts()
    with two_hosts(tmp_path) as found:
        yield found


def start_torchrun(hosts, *program, **options):
    """torchrun on both hosts."""
    return [
        subprocess.Popen(
            hosts.command(host, *torchrun(host, *program, **options)),
            env=environment("openmpi", GLOO_SOCKET_IFNAME=INTERFACE),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(2)
    ]


def job(name, *arguments, folder):
    folder.mkdir(exist_ok=True)
    return ("-m", "tests.mpi.launch", name, json.dumps(arguments), str(folder), "280")


def check_both(values, hosts):
    for rank, value in enumerate(values):
        assert value["host"] == hosts.names[rank]
        assert value["ranks"] == 2
        kind, ranks, _ = value["private"][0]
        assert (kind, ranks) == ("DirectoryNotSharedError", [1] if rank == 0 else 1)
        assert value["private"][1] == value["private"][0]
        assert value["left"] == []
        assert value["missing"][0] == "CheckpointNotFoundError"
        assert value["reduced"] == [2.0, 2.0, 2.0]


def test_torchrun_on_two_nodes(tmp_path, hosts):
    out = tmp_path / "out"
    program = job("over_two_hosts", str(tmp_path), str(hosts.private), folder=out)
    nodes = start_torchrun(hosts, *program)
    texts = [node.communicate(timeout=280)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(texts)
    values = [json.loads((out / f"{rank}.json").read_text())[1] for rank in range(2)]
    check_both(values, hosts)
    assert len(shardckpt.load_state(tmp_path / "shared")["w"]) == 10


@needs("openmpi")
def test_mpirun_on_two_hosts(tmp_path, hosts):
    options = ["--allow-run-as-root", "--prtemca", "plm_ssh_agent", str(hosts.enter), "-n", "2"]
    options += ["--host", ",".join(f"{address}:1" for address in ADDRESSES)]
    done = run_job(
        "openmpi",
        2,
        "over_two_hosts",
        str(tmp_path),
        str(hosts.private),
        folder=tmp_path / "out",
        launch=lambda program: hosts.command(0, f"{sys.prefix}/bin/mpirun", *options, *program),
    )
    check_both(done.checked(), hosts)
