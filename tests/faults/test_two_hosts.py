"""Two hosts, as network namespaces joined by a cable that is pulled in each phase of a save: both
sides raise within the deadline, and nothing is committed."""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import errors
from shardckpt.saving import agreement, commit
from tests.ranks import PRELOAD

pytestmark = pytest.mark.ranks

PHASES = ["plan", "write"]
CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def name_of(side: str, number: int) -> str:
    return f"sc{os.getpid()}{side}{number}"


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """For each phase two namespaces, joined; their names are those of their ends of the cable."""
    pairs = [[name_of(side, number) for side in "ab"] for number in range(len(PHASES))]
    try:
        for number, pair in enumerate(pairs):
            for name in pair:
                ip("netns", "add", name)
            ip("link", "add", pair[0], "type", "veth", "peer", "name", pair[1])
            for rank, name in enumerate(pair):
                ip("link", "set", name, "netns", name)
                ip("-n", name, "addr", "add", f"10.213.{number}.{rank + 1}/24", "dev", name)
                ip("-n", name, "link", "set", name, "up")
                ip("-n", name, "link", "set", "lo", "up")
        yield pairs
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no right to make network namespaces: {error}")
    finally:
        for name in (name for pair in pairs for name in pair):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def rank_on(host: str, rank: int, number: int, folder: str, results: Any) -> None:
    """A rank on a host: saves, and then saves again while the cable is pulled in a phase."""
    torch.set_num_threads(1)
    with open(f"/var/run/netns/{host}") as namespace:
        assert not ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET)
    os.environ["GLOO_SOCKET_IFNAME"] = host
    os.environ["SHARDCKPT_DEADLINE_S"] = str(5.0)
    os.environ["SHARDCKPT_ARRIVAL_DEADLINE_S"] = str(5.0)
    minute = datetime.timedelta(seconds=60)
    store = dist.TCPStore(f"10.213.{number}.1", 29511, is_master=rank == 0, timeout=minute)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    state = {"w": torch.arange(100.0), "step": 1}
    shardckpt.save(state, f"{folder}/before")
    exchange = agreement.exchange

    def faulty(coordinator, name, local, decide):
        def part():
            if name == PHASES[number]:
                if rank == 0:
                    Path(folder, "pull").touch()
                while not os.path.exists(f"{folder}/pulled"):
                    time.sleep(0.02)
            return local()

        return exchange(coordinator, name, part, decide)

    agreement.exchange = commit.exchange = faulty
    begun = time.monotonic()
    try:
        shardckpt.save({**state, "new": torch.ones(3)}, f"{folder}/c")
        told = "saved"
    except errors.RankFailedError as error:
        told = error.rank if isinstance(error.rank, tuple) else (error.rank,)
    results.put((number, rank, told, time.monotonic() - begun))
    results.close()
    results.join_thread()
    os._exit(0)


def pull(folder: Path, host: str) -> None:
    """Take the cable away once both ranks are in the phase."""
    give_up_at = time.monotonic() + 150
    while not (folder / "pull").exists():
        assert time.monotonic() < give_up_at, "the ranks don't get so far"
        time.sleep(0.05)
    ip("-n", host, "link", "set", host, "down")
    (folder / "pulled").touch()


def test_the_cable_is_pulled(tmp_path, hosts):
    """In every phase at the same time, each on its own two hosts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    folders = [tmp_path / phase for phase in PHASES]
    processes = []
    for number, pair in enumerate(hosts):
        folders[number].mkdir()
        for rank, host in enumerate(pair):
            arguments = (host, rank, number, str(folders[number]), results)
            processes.append(context.Process(target=rank_on, args=arguments, daemon=True))
            processes[-1].start()
    try:
        for folder, pair in zip(folders, hosts, strict=True):
            pull(folder, pair[0])
        told = [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for _, rank, named, seconds in told:
        assert named == (1 - rank,), told
        assert seconds < 40, told
    for folder in folders:
        assert not (folder / "c").exists()
        assert shardckpt.load_state(folder / "before")["step"] == 1
