"""Processes killed at random moments of saves, replacing saves, async saves, retention, and the
collection of what the killed ones left. Each save is acknowledged over a pipe, and an
acknowledged checkpoint must load."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable

import torch

import shardckpt
from shardckpt.convert.single_files import write_one
from shardckpt.storage import deletion
from shardckpt.storage.posix import System
from tests.faults import files, retention
from tests.faults.crash import state_of

KILLS_A_TRIAL = 100
KEEP_EVERY = 50
KINDS = ("torch", "safetensors", "components")


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


def filer(folder: str, oracle: int, first: int, elements: int) -> None:
    """Save files and folders of each kind in turn, as `saver` saves checkpoints."""
    for version in itertools.count(first):
        state = state_of(version, elements=elements)
        name, write = files.KINDS[KINDS[version % len(KINDS)]]
        os.write(oracle, f"b{version} ".encode())
        write(state, f"{folder}/files/{name}", System())
        os.write(oracle, f"a{version} ".encode())


class Teller(System):
    """The system, for a retention.Job that tells over a pipe what it does."""

    def __init__(self, oracle: int) -> None:
        self.oracle = oracle

    def mark(self, kind: str, version: int) -> None:
        os.write(self.oracle, f"{kind[0]}{version} ".encode())


def keeper(folder: str, oracle: int, first: int, elements: int) -> None:
    """Save step after step, and remove what need not stay."""
    job = retention.Job(
        Teller(oracle),
        folder=f"{folder}/kept",
        elements=elements,
        asynchronous=first % 2 == 0,
        keep=retention.policies(KEEP_EVERY),
    )
    job.version = (first - 1) * retention.STEP
    while True:
        job.save()


def kill_once(
    work: Callable[[str, int, int, int], None], folder: str, rng: random.Random, first: int
) -> tuple[list[int], list[int]]:
    """Kill a saver or keeper at a random moment; the versions acknowledged, and begun."""
    read, write = os.pipe()
    elements = rng.choice([10, 1000, 300_000])
    child = forked(lambda: work(folder, write, first, elements))
    os.close(write)
    told, saves = os.read(read, 1), rng.choice([0, 0, 1, 2, 4])  # its first save has begun
    while told.count(b"a") < saves and (chunk := os.read(read, 1 << 16)):
        told += chunk
    time.sleep(rng.random() ** 2 * 0.1)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while chunk := os.read(read, 1 << 16):
        told += chunk
    os.close(read)
    assert os.WIFSIGNALED(status), f"the saver ended by itself: {status}"
    words = told.decode().split()
    return [int(word[1:]) for word in words if word[0] == "a"], [
        int(word[1:]) for word in words if word[0] == "b"
    ]


class Replacing:
    """One path, saved over and over."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.acknowledged = self.begun = 0

    def kill(self, rng: random.Random) -> None:
        done, begun = kill_once(saver, self.folder, rng, self.begun + 1)
        acknowledged, self.begun = max([self.acknowledged, *done]), max(begun)
        self.acknowledged = newest(self.folder)  # a checkpoint that was seen must stay
        assert acknowledged <= self.acknowledged <= self.begun, (
            f"version {self.acknowledged} loads; {acknowledged} was acknowledged, "
            f"{self.begun} begun"
        )

    def end(self) -> None:
        shardckpt.save(state_of(self.begun + 1), f"{self.folder}/c", overwrite=True)
        left = [name for name in os.listdir(self.folder) if name not in ("c", "kept", "files")]
        assert not left, f"leftovers: {left}"


class Filing:
    """Single files and folders of components, each saved over and over."""

    def __init__(self, folder: str) -> None:
        self.folder = f"{folder}/files"
        self.acknowledged = dict.fromkeys(KINDS, 0)
        self.begun = 0

    def kill(self, rng: random.Random) -> None:
        done, begun = kill_once(filer, os.path.dirname(self.folder), rng, self.begun + 1)
        self.begun = max(begun)
        for number, kind in enumerate(KINDS):
            mine = [version for version in done if version % len(KINDS) == number]
            least = max([self.acknowledged[kind], *mine])
            self.acknowledged[kind] = self._newest(kind)
            assert least <= self.acknowledged[kind] <= self.begun, (
                f"{kind}: version {self.acknowledged[kind]} loads; {least} was acknowledged"
            )

    def _newest(self, kind: str) -> int:
        try:
            return files.version_of(files.read(f"{self.folder}/{files.KINDS[kind][0]}"))
        except shardckpt.errors.CheckpointNotFoundError:
            return 0

    def end(self) -> None:
        names = {name for name, _ in (files.KINDS[kind] for kind in KINDS)}
        write_one(state_of(1), f"{self.folder}/last.pth", overwrite=True)
        left = [n for n in os.listdir(self.folder) if n not in {*names, "last.pth"}]
        assert not left, f"leftovers: {left}"


class Retaining:
    """A folder of steps, of which some are kept."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.acknowledged: set[int] = set()
        self.begun = 0

    def kill(self, rng: random.Random) -> None:
        done, begun = kill_once(keeper, self.folder, rng, self.begun + 1)
        self.acknowledged |= {version // retention.STEP for version in done}
        self.begun = max(begun) // retention.STEP
        found = set(retention.versions_at(System(), f"{self.folder}/kept"))
        retention.assert_kept(found, self.acknowledged, every=KEEP_EVERY)
        assert max(found, default=0) <= self.begun
        self.acknowledged |= found

    def end(self) -> None:
        found = set(retention.versions_at(System(), f"{self.folder}/kept"))
        null = os.open(os.devnull, os.O_WRONLY)
        keep = retention.policies(KEEP_EVERY)
        job = retention.Job(Teller(null), folder=f"{self.folder}/kept", keep=keep)
        job.version = self.begun * retention.STEP
        job.save()
        os.close(null)
        steps = {*found, self.begun + 1}
        retention.assert_swept(System(), steps, folder=f"{self.folder}/kept", every=KEEP_EVERY)


def kill_many(folder: str, rng: random.Random, count: int) -> None:
    """Kill so many savers and keepers, and load after each."""
    jobs = Replacing(folder), Retaining(folder), Filing(folder)
    for _ in range(count):
        rng.choice(jobs).kill(rng)
    for job in jobs:
        job.end()


def trial(seed: int) -> int:
    """A hundred kills, in a process of its own: only one without threads may fork."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.faults.kills", folder]
        arguments = ["--seed", str(seed), "--count", str(KILLS_A_TRIAL)]
        child = os.posix_spawn(sys.executable, [*command, *arguments], os.environ)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"python -m tests.faults.kills FOLDER {' '.join(arguments)} failed"
    return KILLS_A_TRIAL


def _forget() -> None:
    """Acknowledge a save that was not published."""
    System.rename = lambda self, source, target: None  # type: ignore[method-assign]
    System.exchange = lambda self, one, other: None  # type: ignore[method-assign]


def _remove_too_much() -> None:
    """Removal takes the newest as well."""
    remove = deletion.remove

    def both(system: System, path: str) -> None:
        folder = os.path.dirname(path)
        steps = [int(name[5:]) for name in os.listdir(folder) if name.startswith("step-")]
        remove(system, path)
        remove(system, os.path.join(folder, f"step-{max(steps)}"))

    deletion.remove = both


PLANTED: dict[str, Callable[[], None]] = {"forget": _forget, "remove": _remove_too_much}


def main() -> int:
    """Kill savers in a folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--plant", choices=PLANTED, help="a fault that is to be found")
    options = parser.parse_args()
    torch.set_num_threads(1)  # torch's own threads don't survive a fork
    if options.plant:
        PLANTED[options.plant]()
    with tempfile.TemporaryDirectory() as folder:  # imports all that a save needs
        shardckpt.save(state_of(1), f"{folder}/c")
        write_one(state_of(1), f"{folder}/c.pth", overwrite=False)
    kill_many(options.folder, random.Random(options.seed), options.count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
