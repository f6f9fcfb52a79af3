"""Two hosts, as network namespaces joined by a cable that is pulled in each phase of a save: both
sides raise within the deadline, and nothing is committed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardckpt

pytestmark = pytest.mark.ranks

NAMES = [f"sckpt{os.getpid()}{side}" for side in "ab"]
HOSTS = ["10.213.7.1", "10.213.7.2"]

JOB = """
import datetime, json, os, sys, time
import torch, torch.distributed as dist
import shardckpt
from shardckpt import errors, knobs
from shardckpt.execution import save_driver
rank, folder, phase = int(sys.argv[1]), sys.argv[2], sys.argv[3]
knobs.DEADLINE_S = knobs.ARRIVAL_DEADLINE_S = 5.0
store = dist.TCPStore(HOST, 29511, is_master=rank == 0, timeout=datetime.timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
state = {"w": torch.arange(100.0), "step": 1}
shardckpt.save(state, f"{folder}/before")
exchange = save_driver.exchange
def faulty(coordinator, name, local, decide):
    def part():
        if name == phase:
            if rank == 0:
                open(f"{folder}/pull", "w").close()
            while not os.path.exists(f"{folder}/pulled"):
                time.sleep(0.02)
        return local()
    return exchange(coordinator, name, part, decide)
save_driver.exchange = faulty
begun = time.monotonic()
try:
    shardckpt.save({**state, "new": torch.ones(3)}, f"{folder}/c")
    told = "saved"
except errors.RankFailedError as error:
    told = list(error.rank) if isinstance(error.rank, tuple) else [error.rank]
print(json.dumps([told, time.monotonic() - begun]), flush=True)
os._exit(0)
""".replace("HOST", repr(HOSTS[0]))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces, joined."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", NAMES[0][-14:], "type", "veth", "peer", "name", NAMES[1][-14:])
        for name, host in zip(NAMES, HOSTS, strict=True):
            ip("link", "set", name[-14:], "netns", name)
            ip("-n", name, "addr", "add", f"{host}/24", "dev", name[-14:])
            ip("-n", name, "link", "set", name[-14:], "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"no right to make network namespaces: {error}")
    yield NAMES
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize("phase", ["plan", "write"])
def test_the_cable_is_pulled(tmp_path, hosts, phase):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                name,
                sys.executable,
                "-c",
                JOB,
                str(rank),
                str(tmp_path),
                phase,
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "GLOO_SOCKET_IFNAME": name[-14:]},
        )
        for rank, name in enumerate(hosts)
    ]
    try:
        pull(tmp_path, hosts)
        found = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    (first, first_s), (second, second_s) = found
    assert first == [1]
    assert second == [0]
    assert max(first_s, second_s) < 40, found
    assert not (tmp_path / "c").exists()
    assert shardckpt.load_state(tmp_path / "before")["step"] == 1


def pull(tmp_path: Path, hosts: list[str]) -> None:
    """Take the cable away once both ranks are in the phase."""
    give_up_at = time.monotonic() + 150
    while not (tmp_path / "pull").exists():
        assert time.monotonic() < give_up_at, "the ranks don't get so far"
        time.sleep(0.05)
    ip("-n", hosts[0], "link", "set", hosts[0][-14:], "down")
    (tmp_path / "pulled").touch()
