"""Several nodes: torchrun over c10d and mpirun over hosts; network namespaces stand for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import shardckpt
from tests.mpi.hosts import ADDRESSES, INTERFACE, needs_hosts, torchrun, two_hosts
from tests.mpi.launch import environment, needs

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(500)]


@pytest.fixture
def hosts(tmp_path):
    needs_hosts()
    with two_hosts(tmp_path) as found:
        yield found


def start(command):
    return subprocess.Popen(
        command,
        env=environment("openmpi", GLOO_SOCKET_IFNAME=INTERFACE),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def mpirun(hosts, program):
    """The command line of Open MPI's mpirun: a rank on each host, started through `enter`."""
    options = ["--allow-run-as-root", "--prtemca", "plm_ssh_agent", str(hosts.enter), "-n", "2"]
    options += ["--host", ",".join(f"{address}:1" for address in ADDRESSES)]
    return hosts.command(0, f"{sys.prefix}/bin/mpirun", *options, *program)


def job(name, *arguments, folder):
    folder.mkdir(exist_ok=True)
    return ("-m", "tests.mpi.launch", name, json.dumps(arguments), str(folder), "280")


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpirun", marks=[needs("openmpi")])])
def test_two_hosts_save_until_the_cable_is_pulled(tmp_path, hosts, launcher):
    """All works between them; then the cable is pulled: both sides raise an error that names the
    other, and nothing is committed."""
    out = tmp_path / "out"
    program = job("over_two_hosts", str(tmp_path), str(hosts.private), folder=out)
    if launcher == "torchrun":
        nodes = [start(hosts.command(host, *torchrun(host, *program))) for host in range(2)]
    else:
        nodes = [start(mpirun(hosts, [sys.executable, *program]))]
    try:
        wait_for([tmp_path / "writing"], nodes)
        time.sleep(0.5)
        hosts.cut()
        wait_for([out / "0.json", out / "1.json"], nodes)
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait(timeout=20)
    hosts.power_off()
    assert not [pid for name in hosts.names for pid in hosts.processes(name)]
    for rank in range(2):
        well, found = json.loads((out / f"{rank}.json").read_text())
        assert well, found
        check_together(found[0], hosts, rank)
        check_cut_off(found[1], rank)
    assert len(shardckpt.load_state(tmp_path / "shared")["w"]) == 10
    assert not (tmp_path / "cut").exists()


def check_together(value, hosts, rank):
    assert value["host"] == hosts.names[rank]
    assert value["ranks"] == 2
    kind, ranks, _ = value["private"][0]
    assert (kind, ranks) == ("DirectoryNotSharedError", [1])
    assert value["private"][1] == value["private"][0]
    assert value["left"] == []
    assert value["missing"][0] == "CheckpointNotFoundError"
    assert value["reduced"] == [2.0, 2.0, 2.0]


def check_cut_off(found, rank):
    ranks, phase, took_s = found
    assert ranks in ([1 - rank], 1 - rank)
    assert phase == "write"
    assert took_s < 60


def wait_for(files, nodes):
    give_up_at = time.monotonic() + 200
    while not all(file.exists() for file in files):
        assert time.monotonic() < give_up_at
        assert any(node.poll() is None for node in nodes)
        time.sleep(0.1)
