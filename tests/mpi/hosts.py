"""Two hosts on one machine: network namespaces, each with its own name and network address."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "shard0"


def _allowed() -> str:
    """Why there can't be hosts here; empty if there can."""
    probe = (
        "ip netns add shardprobe$$ && ip netns delete shardprobe$$ && unshare --uts --mount true"
    )
    done = subprocess.run(["sh", "-c", probe], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip() or "ip and unshare fail")


def needs_hosts() -> None:
    """Skip where namespaces are not allowed."""
    if why := _allowed():
        pytest.skip(f"network namespaces can't be made here: {why.splitlines()[0]}")


class Hosts:
    """The two hosts. The second one sees an empty `private` folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"shard{os.getpid()}{letter}" for letter in "ab"]
        self.private = folder / "private"
        self.private.mkdir()
        self.enter = folder / "enter"
        self.enter.write_text(self._script())
        self.enter.chmod(0o755)

    def _script(self) -> str:
        """enter ADDRESS COMMAND...: what ssh would do."""
        first, second = self.names
        return f"""#!/bin/sh
address=$1; shift
name={first}; mount=true
[ "$address" = {ADDRESSES[1]} ] && name={second} && mount="mount -t tmpfs none {self.private}"
export PATH=$PATH:/usr/sbin:/sbin
inside="hostname $name; $mount; exec sh -c \\"\\$*\\""
exec ip netns exec $name unshare --uts --mount sh -c "$inside" -- "$@"
"""

    def command(self, host: int, *program: str) -> list[str]:
        """A command line that runs a program on a host."""
        return [str(self.enter), ADDRESSES[host], shlex.join(program)]

    def cut(self) -> None:
        """Unplug the cable."""
        _ip("-n", self.names[0], "link", "set", INTERFACE, "down")

    def power_off(self) -> None:
        """Kill whatever still runs on them, the daemons that mpirun leaves included."""
        for name in self.names:
            while pids := self.processes(name):
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)

    def processes(self, name: str) -> list[int]:
        """The processes of a host."""
        found = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in found.stdout.split()]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two hosts with a cable between them."""
    hosts = Hosts(folder)
    first, second = hosts.names
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip(
            "-n",
            first,
            "link",
            "add",
            INTERFACE,
            "type",
            "veth",
            "peer",
            INTERFACE,
            "netns",
            second,
        )
        for name, address in zip(hosts.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
        yield hosts
    finally:
        hosts.power_off()
        for name in hosts.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def torchrun(host: int, *program: str, nodes: str = "2", **more: str) -> list[str]:
    """torchrun on one of the hosts, which meet over c10d; the first one holds the store."""
    conf = {"is_host": str(host == 0).lower(), **more}
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes),
        *("--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"),
        *("--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--local-addr", ADDRESSES[host]),
        *("--rdzv-conf", ",".join(f"{key}={value}" for key, value in conf.items())),
        *program,
    ]
