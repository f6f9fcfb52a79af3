"""A job that loses a node comes back with fewer ranks, from the newest intact checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import shardckpt
from tests.mpi.launch import environment

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]


def start_node(number, port, folder, out):
    """torchrun for one of one or two nodes."""
    # A busy machine must not take a node for dead that has missed three signs of life.
    conf = f"is_host={str(number == 0).lower()},last_call_timeout=5,keep_alive_interval=3"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--max-restarts", "2"),
        *("--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "elastic"),
        *("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", conf, "--local-addr", "127.0.0.1"),
        *("-m", "tests.mpi.launch", "elastic", json.dumps([str(folder)]), str(out), "250"),
    ]
    return subprocess.Popen(
        command,
        env=environment("openmpi", **({"LOST": "1"} if number else {})),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.long
def test_a_lost_node(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "out"
    out.mkdir()
    first, second = (start_node(number, port, tmp_path, out) for number in range(2))
    try:
        give_up_at = time.monotonic() + 200
        while not list(tmp_path.glob(".step-5*")):  # being saved, by two ranks
            assert first.poll() is None
            assert time.monotonic() < give_up_at
            time.sleep(0.2)
        shard = sorted((tmp_path / "step-4").glob("*.safetensors"))[0]
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1  # the newest one is damaged, too
        shard.write_bytes(data)
        lose(second)
        assert first.wait(timeout=200) == 0
    finally:
        lose(first)
        lose(second)
    assert (tmp_path / "starts").read_text().split("\n")[-2:] == ["1 3", ""]
    assert json.loads((out / "0.json").read_text()) == [True, [1, 8]]
    state = shardckpt.load_state(tmp_path / "step-8")
    assert np.array_equal(state["u"], np.arange(12.0) * sum(range(1, 9)))


def lose(node):
    """The agent, and its worker, which has a session of its own."""
    for child in subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(node.pid)], capture_output=True, text=True, check=False
    ).stdout.split():
        kill(int(child))
    kill(node.pid)
    node.wait(timeout=20)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
