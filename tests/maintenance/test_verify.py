"""Verification: the corrupted blocks, tensors and shards, and the messages about them."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.format.manifest import from_bytes
from shardckpt.maintenance import verify
from shardckpt.maintenance.verify import ShardCorruption, find_corruption, verify_shards
from tests.faults.damage import Shelf, a_checkpoint

SHARD = "shard-00000-of-00001.safetensors"
BLOCKS = 11
NAMES = [f"t{n}" for n in range(10)]


class Faulty(Shelf):
    """Files of which some blocks can't be read."""

    def __init__(self, files, *, code=None, blocks=()):
        super().__init__(files)
        self.code, self.blocks = code, set(blocks)

    def readinto(self, name, buffers, *, offset):
        end = offset + sum(map(len, buffers))
        touched = set(range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)))
        if name == SHARD and self.code and touched & self.blocks:
            raise errors.StorageError("no", errno=self.code, path=name)
        super().readinto(name, buffers, offset=offset)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One shard of ten tensors of a MiB each, and a header: block n has the end of tensor n - 1 and
    all else of tensor n."""
    folder = tmp_path_factory.mktemp("verify")
    random = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randint(0, 255, (1 << 20,), dtype=torch.uint8, generator=random)
        for name in NAMES
    }
    shardckpt.save(tensors, folder / "c")
    return {path.name: path.read_bytes() for path in (folder / "c").iterdir()}


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    monkeypatch.setattr(verify, "BUFFER_BYTES", 2 * BLOCK_BYTES)


@pytest.fixture
def no_search(monkeypatch):
    """Looking for a flipped bit takes a while."""
    monkeypatch.setattr(verify, "find_flipped_bit", lambda data, digest: None)


def manifest_of(files):
    return from_bytes(files["manifest.json"], path="shelf")


def corrupt(files, *blocks, shard=SHARD):
    data = bytearray(files[shard])
    for block in blocks:
        data[block * BLOCK_BYTES + 4000] ^= 0xFF
    return {**files, shard: bytes(data)}


def check(files, shelf=None, **options):
    return verify_shards(shelf or Shelf(files), manifest_of(files), **options)


def test_an_intact_checkpoint(files):
    told, size = [], len(files[SHARD])
    report = check(files, progress=told.append)
    assert (report.path, report.checked_bytes, sum(told)) == ("shelf", size, size)
    assert (report.corrupted, report.intact, report.errors) == ((), tuple(NAMES), ())
    assert size // BLOCK_BYTES == BLOCKS - 1


def test_no_more_is_read_than_is_checked(files):
    class Counting(Shelf):
        most = 0

        def readinto(self, name, buffers, *, offset):
            self.most = max(self.most, sum(map(len, buffers)))
            super().readinto(name, buffers, offset=offset)

        def read_past_cache(self, name, buffer, *, offset, size_bytes):
            self.most = max(self.most, size_bytes)
            return False

    shelf = Counting(files)
    assert not check(files, shelf).errors
    assert shelf.most == 2 * BLOCK_BYTES


def test_the_coordinator_gets_the_progress(files):
    class Spy(SingleCoordinator):
        told = 0

        def progress(self, amount):
            self.told += amount

    spy = Spy()
    check(files, coordinator=spy)
    assert spy.told == len(files[SHARD])


@pytest.mark.parametrize("rank", range(3))
def test_ranks_divide_the_work(files, monkeypatch, rank):
    class Rank(SingleCoordinator):
        world_size = 3

    def checked(files, manifest, *, subset, progress):
        asked.append(subset)
        raise errors.StateError("enough")

    asked, one = [], Rank()
    one.rank = rank
    one.gather = lambda payload, phase: [payload] * 3
    monkeypatch.setattr(verify, "_check_blocks", checked)
    with pytest.raises(errors.StateError):
        check(files, coordinator=one, subset=(2, 4))
    assert asked == [(2 + 4 * rank, 12)]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_together_check_all(files, parts, no_search):
    damaged = corrupt(files, *range(BLOCKS))
    reports = [check(damaged, subset=(part + 1, parts)) for part in range(parts)]
    assert sum(report.checked_bytes for report in reports) == len(files[SHARD])
    windows = [set(range(low, min(low + 2, BLOCKS))) for low in range(0, BLOCKS, 2)]
    for part, report in enumerate(reports):
        expected = sorted(block for window in windows[part::parts] for block in window)
        (error,) = report.errors
        shown = ", ".join(map(str, expected[:8])) + (", ..." if len(expected) > 8 else "")
        assert error.expected == f"the digests in the manifest for block {shown}"


@pytest.mark.parametrize("subset", [(0, 3), (4, 3), (2, 1), (-1, 3)])
def test_parts_that_there_are_not(files, subset):
    with pytest.raises(errors.StateError):
        check(files, subset=subset)


def test_corrupted_blocks_are_listed_by_shard(files, no_search):
    for blocks in ((0, 3), (10,)):
        (damage,) = find_corruption(Shelf(corrupt(files, *blocks)), manifest_of(files))
        assert (damage.shard, damage.blocks, damage.flips) == (0, blocks, ())
    assert find_corruption(Shelf(files), manifest_of(files)) == []


def test_only_the_tensors_in_a_block_are_corrupted(files, no_search):
    report = check(corrupt(files, 3))
    assert report.corrupted == ("t2", "t3")
    assert report.intact == tuple(name for name in NAMES if name not in ("t2", "t3"))
    (error,) = report.errors
    assert error.message == "A shard is corrupted"
    assert (error.path, error.tensor) == (f"shelf/{SHARD}", "t2, t3")
    assert error.expected == "the digests in the manifest for block 3"
    assert "rescue" in error.remedy


@pytest.mark.parametrize(("count", "shown"), [(8, "0, 1, 2, 3, 4, 5, 6, 7"), (9, "7, ...")])
def test_eight_blocks_are_named(files, count, shown, no_search):
    (error,) = check(corrupt(files, *range(count))).errors
    assert error.expected.endswith(shown)


@pytest.mark.parametrize(("blocks", "searched"), [((0, 4, 10), True), ((0, 1, 4, 10), False)])
def test_a_few_blocks_are_searched_for_a_flipped_bit(files, monkeypatch, blocks, searched):
    damaged, seen = corrupt(files, *blocks), []

    def find(data, digest):
        number = len(seen)
        low = blocks[number] * BLOCK_BYTES
        assert bytes(data) == damaged[SHARD][low : low + BLOCK_BYTES]
        assert digest == block_digest(files[SHARD][low : low + BLOCK_BYTES])
        seen.append(number)
        return 4000, 2

    monkeypatch.setattr(verify, "find_flipped_bit", find)
    (damage,) = find_corruption(Shelf(damaged), manifest_of(files))
    assert len(seen) == (len(blocks) if searched else 0)
    places = [block * BLOCK_BYTES + 4000 for block in blocks]
    if searched:
        assert damage.message == "Single bits were flipped in a shard"
        assert damage.flips == tuple((place, 2) for place in places)
        assert damage.actual == ", ".join(f"bit 2 of byte {place}" for place in places) + " flipped"
    assert damage.blocks == blocks


def test_bits_that_are_not_found_are_not_reported(files, monkeypatch):
    answers = iter([(1, 1), None])
    monkeypatch.setattr(verify, "find_flipped_bit", lambda data, digest: next(answers))
    (damage,) = find_corruption(Shelf(corrupt(files, 1, 2)), manifest_of(files))
    assert damage.flips == ()
    assert damage.actual == "different or unreadable bytes"


@pytest.mark.parametrize("last", [True, False])
def test_a_flipped_bit_corrupts_only_its_tensor(monkeypatch, last):
    files = a_checkpoint()
    manifest = manifest_of(files)
    chunks = sorted(
        (row[0], row[1], row[2], name)
        for name, entry in manifest.tensors.items()
        for row in entry.chunks.tolist()
    )
    one, other = next(p for p in itertools.pairwise(chunks) if p[0][0] == p[1][0])
    shard, begin, end, name = one if last else other
    byte = end - 1 if last else begin
    file = manifest.shards[shard].name
    data = bytearray(files[file])
    data[byte] ^= 1
    report = verify_shards(Shelf({**files, file: bytes(data)}), manifest)
    assert report.corrupted == (name,)
    (error,) = report.errors
    assert error.message == "A single bit was flipped in a shard"
    assert error.actual == f"bit 0 of byte {byte} flipped"


def test_a_shard_that_is_missing(files):
    report = check({"manifest.json": files["manifest.json"]})
    assert report.corrupted == tuple(NAMES)
    assert report.checked_bytes == 0
    (error,) = report.errors
    assert error.message == "A shard is missing, or is not a regular file"


@pytest.mark.parametrize(
    ("size", "lost", "checked"),
    [
        (0, range(11), 0),
        (7, range(11), 0),
        (3 * BLOCK_BYTES, range(3, 11), 3),
        (3 * BLOCK_BYTES + 9, range(3, 11), 3),
        (10 * BLOCK_BYTES + 1, range(10, 11), 10),
    ],
)
def test_a_shard_that_is_cut(files, size, lost, checked):
    cut = {**files, SHARD: files[SHARD][:size]}
    (damage,) = find_corruption(Shelf(cut), manifest_of(files))
    assert (damage.message, damage.blocks) == ("A shard is truncated", tuple(lost))
    assert (damage.expected, damage.actual) == (f"{len(files[SHARD])} bytes", f"{size} bytes")
    assert check(cut).checked_bytes == checked * BLOCK_BYTES


def test_damage_before_a_cut_is_reported_too(files, no_search):
    damaged = corrupt(files, 1)
    damaged[SHARD] = damaged[SHARD][: 9 * BLOCK_BYTES]
    (damage,) = find_corruption(Shelf(damaged), manifest_of(files))
    assert damage.blocks == (1, 9, 10)


def test_appended_bytes_corrupt_no_tensor(files):
    report = check({**files, SHARD: files[SHARD] + b"more"})
    assert report.corrupted == ()
    (error,) = report.errors
    assert error.message == "Bytes were appended to a shard"
    assert error.tensor is None


def test_a_block_that_the_disk_can_not_read(files):
    (error,) = check(files, Faulty(files, code=errno.EIO, blocks=[3, 10])).errors
    assert error.expected == "the digests in the manifest for block 3, 10"
    assert error.actual == "different or unreadable bytes"


def test_another_error_ends_the_check(files):
    with pytest.raises(errors.StorageError):
        check(files, Faulty(files, code=errno.EACCES, blocks=[3]))


def test_a_read_that_hangs(files, monkeypatch):
    monkeypatch.setenv("SHARDCKPT_STALL_DEADLINE_S", str(0.2))
    go_on = threading.Event()

    class Hangs(Shelf):
        def readinto(self, name, buffers, *, offset):
            go_on.wait(20)

    try:
        with pytest.raises(errors.StalledError):
            check(files, Hangs(files))
    finally:
        go_on.set()


def renamed(files, names):
    """Another header than the manifest's, and digests that fit it."""
    manifest, data = manifest_of(files), bytearray(files[SHARD])
    for name in names:
        at = data.index(f'"{name}"'.encode())
        data[at + 1 : at + 3] = b"zz" if name == names[0] else b"yy"
    digests = [
        block_digest(data[low : low + BLOCK_BYTES]) for low in range(0, len(data), BLOCK_BYTES)
    ]
    shard = replace(manifest.shards[0], digests=np.array(digests, np.uint64))
    return {**files, SHARD: bytes(data)}, replace(manifest, shards=(shard,))


@pytest.mark.parametrize("names", [["t1"], ["t1", "t2"]])
def test_a_header_that_contradicts_the_manifest_is_an_error(files, names):
    """The error names the first place in a shard."""
    forged, manifest = renamed(files, names)
    (error,) = verify_shards(Shelf(forged), manifest).errors
    assert error.message == "The header of a shard does not match the manifest"
    assert (error.path, error.tensor) == (f"shelf/{SHARD}", "t1")
    assert error.actual == "no such chunk"
    assert str(error.expected).startswith("('U8', ")
    assert error.remedy == "load another checkpoint"


def test_a_header_that_is_none(files):
    forged, manifest = renamed(files, ["t1"])
    data = bytearray(forged[SHARD])
    data[8] = ord("[")
    digests = manifest.shards[0].digests.copy()
    digests[0] = block_digest(data[:BLOCK_BYTES])
    manifest = replace(manifest, shards=(replace(manifest.shards[0], digests=digests),))
    (error,) = verify_shards(Shelf({**forged, SHARD: bytes(data)}), manifest).errors
    assert error.path == f"shelf/{SHARD}"


def test_damage_of_one_shard_hides_no_other(no_search):
    """One shard is cut, the header of another one tells another story."""
    files = a_checkpoint()
    manifest = manifest_of(files)
    first, second = (shard.name for shard in manifest.shards)
    data = bytearray(files[first])
    at = data.index(b'"model.') if b'"model.' in data else data.index(b'"ids')
    data[at + 1] = ord("z")
    digest = np.array([block_digest(data)], np.uint64)
    manifest = replace(
        manifest, shards=(replace(manifest.shards[0], digests=digest), manifest.shards[1])
    )
    damaged = {**files, first: bytes(data), second: files[second][:-1]}
    found = verify_shards(Shelf(damaged), manifest).errors
    assert [error.message for error in found] == [
        "A shard is truncated",
        "The header of a shard does not match the manifest",
    ]


def test_values_are_checked(files):
    manifest = manifest_of(files)
    bad = replace(manifest, state={**manifest.state, "bad": {"$bytes": "!"}})
    with pytest.raises(errors.CorruptionError):
        verify_shards(Shelf(files), bad)
    with pytest.raises(errors.CorruptionError):
        verify_shards(Shelf(files), replace(manifest, per_rank=({"$bytes": "!"},)))
    strange = {**manifest.state, "enum": {"$enum": ["no.such.module", "Kind", "ONE"]}}
    assert not verify_shards(Shelf(files), replace(manifest, state=strange)).errors


def test_damage_is_a_value():
    facts = {"shard": 0, "message": "", "expected": "", "actual": "", "blocks": ()}
    damage = ShardCorruption(**facts)
    with pytest.raises(dataclasses.FrozenInstanceError):
        damage.shard = 1
    with pytest.raises(TypeError):
        ShardCorruption(*facts.values())
    assert not hasattr(damage, "__dict__")
