"""A checkpoint held in memory, and every way to damage it: each must be detected and named."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import shardckpt
from shardckpt.errors import CheckpointError, CorruptionError, NotACheckpointError
from shardckpt.loading import shard_reader as reader
from shardckpt.maintenance.reshard import reshard
from shardckpt.storage.base import MANIFEST_NAME, CheckpointFiles, Storage
from shardckpt.storage.local import LocalStorage
from tests.faults.disk import ROOT, Content, Disk

Files = dict[str, bytes]

FLIPS_A_TRIAL = 4000


class Shelf(Storage, CheckpointFiles):
    """A storage of one checkpoint whose files are bytes in memory."""

    in_memory = True

    def __init__(self, files: Files) -> None:
        self.files = files
        self.path = "shelf"

    def open(self, path: str) -> Shelf:
        return self

    def manifest(self) -> bytes:
        if MANIFEST_NAME not in self.files:
            raise NotACheckpointError("no manifest", path=self.path)
        return self.files[MANIFEST_NAME]

    def size_bytes(self, name: str) -> int:
        if name not in self.files:
            raise CorruptionError("missing", path=f"{self.path}/{name}")
        return len(self.files[name])

    def read(self, name: str, buffer: memoryview, *, offset: int) -> None:
        data = self.files.get(name, b"")[offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise CorruptionError("a file ends early", path=f"{self.path}/{name}")
        buffer[:] = data


def state_of(step: int) -> dict[str, object]:
    return {
        "model": {"w": torch.arange(2600.0) * step, "b": torch.full((40,), float(step))},
        "ids": np.arange(5) + step,
        "step": step,
        "name": "a checkpoint",
    }


def a_checkpoint(*, step: int = 3) -> Files:
    """The files of a checkpoint of two shards, some 20 KiB."""
    with tempfile.TemporaryDirectory() as folder:
        shardckpt.save(state_of(step), f"{folder}/one")
        with shardckpt.open_checkpoint(f"{folder}/one") as opened:
            reshard(opened, f"{folder}/two", shards=2, storage=LocalStorage())
        return {path.name: path.read_bytes() for path in Path(folder, "two").iterdir()}


def _yes() -> bool:
    return True


def load(files: Files, *, in_cache: bool = True) -> object:
    """Load the files from a disk in memory, from its page cache or past it."""
    inodes = dict(zip(files, itertools.count(3)))
    held = {inodes[name]: data for name, data in files.items()}
    disk = Disk(Content({ROOT: {"shelf": 2}, 2: inodes}, held), in_cache=in_cache)
    with mock.patch.object(reader, "have_huge_pages", _yes):
        found = shardckpt.load_state("/shelf", storage=LocalStorage(disk))
    assert bool(disk.past_cache) != in_cache, f"{disk.past_cache} reads went past the page cache"
    return found


def refusals(files: Files, what: str) -> Iterator[CheckpointError]:
    """The errors in which a load from the page cache and one past it refuse; AssertionError if one
    does not."""
    for in_cache in (True, False):
        try:
            load(files, in_cache=in_cache)
        except CheckpointError as error:
            assert error.path, error
            yield error
            continue
        raise AssertionError(f"{what} was loaded, {'from' if in_cache else 'past'} the page cache")


def assert_detected(files: Files, name: str) -> None:
    """Loads refuse, in errors that name the file; AssertionError if not."""
    for error in refusals(files, f"damage to {name}"):
        assert name in error.path or name == MANIFEST_NAME, f"{name} is damaged: {error}"


def flip(files: Files, name: str, byte: int, bit: int) -> Files:
    data = bytearray(files[name])
    data[byte] ^= 1 << bit
    return {**files, name: bytes(data)}


def all_bits(files: Files) -> list[tuple[str, int, int]]:
    return [
        (name, byte, bit)
        for name in sorted(files)
        for byte in range(len(files[name]))
        for bit in range(8)
    ]


def all_cuts(files: Files) -> list[tuple[str, int]]:
    return [(name, size) for name in sorted(files) for size in range(len(files[name]))]


def try_flips(files: Files, bits: Sequence[tuple[str, int, int]]) -> int:
    """Flip each of these bits, and load from the page cache and past it; the tensor that it lies in
    is named."""
    with shardckpt.open_checkpoint("shelf", storage=Shelf(files)) as opened:
        manifest = opened.manifest
    places = {
        (manifest.shards[row[0]].name, byte): name
        for name, entry in manifest.tensors.items()
        for row in entry.chunks.tolist()
        for byte in range(row[1], row[2])
    }
    for name, byte, bit in bits:
        damaged = flip(files, name, byte, bit)
        hurt = places.get((name, byte))
        for error in refusals(damaged, f"bit {bit} of byte {byte} of {name}"):
            if hurt is not None:
                assert name in error.path, error
                assert hurt in (error.tensor or "").split(", "), error
    return len(bits)


def try_cuts(files: Files, cuts: Sequence[tuple[str, int]]) -> int:
    for name, size in cuts:
        assert_detected({**files, name: files[name][:size]}, name)
    return len(cuts)


def other_damage() -> Iterator[tuple[str, Files, str]]:
    """(what was done, the files, the file that must be named)."""
    files, other = a_checkpoint(), a_checkpoint(step=4)
    first, second = sorted(name for name in files if name != MANIFEST_NAME)
    for name in files:
        for more in (b"\0", b"x" * 4096):
            yield f"appended to {name}", {**files, name: files[name] + more}, name
        yield f"{name} deleted", {k: v for k, v in files.items() if k != name}, name
        if name != MANIFEST_NAME:
            yield f"{name} of another step", {**files, name: other[name]}, name
            page = bytes(4096)
            for low in range(0, len(files[name]), 4096):
                end = min(low + 4096, len(files[name]))
                zeroed = files[name][:low] + page[: end - low] + files[name][end:]
                yield f"page {low} of {name} zeroed", {**files, name: zeroed}, name
    # Both shards are corrupted. The threads that read determine which one is named first.
    either = "shard-0000"
    yield "shards swapped", {**files, first: files[second], second: files[first]}, either
    yield "manifest of another step", {**files, MANIFEST_NAME: other[MANIFEST_NAME]}, either


def trial(seed: int) -> int:
    """A slice of all bits and of all cuts: successive seeds try every one of them."""
    files = a_checkpoint()
    bits, cuts = all_bits(files), all_cuts(files)
    slices = -(-len(bits) // FLIPS_A_TRIAL)
    part = seed % slices
    tried = try_flips(files, bits[part::slices])
    return tried + try_cuts(files, cuts[part::slices])
