"""Processes killed at random moments of saves, replacing saves, async saves and the collection of
what the killed ones left. The oracle is a pipe: what was acknowledged on it must load."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable

import torch

import shardckpt
from tests.faults.crash import state_of
from tests.faults.disk import System

KILLS_A_TRIAL = 100


def newest(folder: str) -> int:
    """The version of the checkpoint that a load finds, 0 for none; AssertionError for a mixture."""
    try:
        found = shardckpt.load_state(f"{folder}/c")
    except shardckpt.errors.CheckpointNotFoundError:
        return 0
    expected = state_of(found["step"], elements=len(found["w"]))
    assert found["w"].equal(expected["w"]), "a mixture"
    assert found["b"].equal(expected["b"]), "a mixture"
    return int(found["step"])


def forked(work: Callable[[], None]) -> int:
    """The id of a child that does this work."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def saver(folder: str, oracle: int, first: int, elements: int) -> None:
    """Save version after version, and tell of each when it begins and when it is acknowledged."""
    version = first
    while True:
        state = state_of(version, elements=elements)
        os.write(oracle, f"b{version} ".encode())
        if version % 3:
            shardckpt.save(state, f"{folder}/c", overwrite=True)
        else:
            shardckpt.async_save(state, f"{folder}/c", overwrite=True).result(60)
        os.write(oracle, f"a{version} ".encode())
        version += 1


def kill_once(folder: str, rng: random.Random, first: int) -> tuple[int, int]:
    """Kill a saver at a random moment; the newest version acknowledged, and begun."""
    read, write = os.pipe()
    elements = rng.choice([10, 1000, 300_000])
    child = forked(lambda: saver(folder, write, first, elements))
    os.close(write)
    began = os.read(read, 1)  # its first save has begun
    time.sleep(rng.random() ** 2 * 0.3)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    told = began
    while chunk := os.read(read, 1 << 16):
        told += chunk
    os.close(read)
    assert os.WIFSIGNALED(status), f"the saver ended by itself: {status}"
    words = told.decode().split()
    done = [int(word[1:]) for word in words if word[0] == "a"]
    begun = [int(word[1:]) for word in words if word[0] == "b"]
    return max(done, default=0), max(begun)


def kill_many(folder: str, rng: random.Random, count: int) -> int:
    """Kill so many savers in turn, in one folder, and load after each."""
    acknowledged = begun = newest(folder)
    for _ in range(count):
        done, last = kill_once(folder, rng, begun + 1)
        acknowledged, begun = max(acknowledged, done), max(begun, last)
        found = newest(folder)
        assert acknowledged <= found <= begun, (
            f"version {found} loads; {acknowledged} was acknowledged, {begun} begun"
        )
        acknowledged = found  # what has been seen must not go away again
    shardckpt.save(state_of(begun + 1), f"{folder}/c", overwrite=True)
    left = os.listdir(folder)
    assert left == ["c"], f"leftovers: {left}"
    return count


def trial(seed: int) -> int:
    """A hundred kills, in a process of its own: only one without threads may fork."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.faults.kills", folder]
        arguments = ["--seed", str(seed), "--count", str(KILLS_A_TRIAL)]
        child = os.posix_spawn(sys.executable, [*command, *arguments], os.environ)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"python -m tests.faults.kills FOLDER {' '.join(arguments)} failed"
    return KILLS_A_TRIAL


def main() -> int:
    """Kill savers in a folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--forget", action="store_true", help="a planted fault")
    options = parser.parse_args()
    torch.set_num_threads(1)  # torch's own threads don't survive a fork
    if options.forget:  # acknowledges what it has not published
        System.rename = lambda self, source, target: None  # type: ignore[method-assign]
        System.exchange = lambda self, one, other: None  # type: ignore[method-assign]
    kill_many(options.folder, random.Random(options.seed), options.count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
