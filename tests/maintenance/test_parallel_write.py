"""Files that several ranks write together are, byte for byte, those that one rank writes."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.convert.opening import open_source
from shardckpt.convert.safetensors_files import HuggingFace, SafetensorsFile
from shardckpt.convert.single_files import read_one
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.maintenance import reshard
from shardckpt.plan.local_plan import ChunkTable
from shardckpt.storage.local import LocalStorage


class Ranks:
    """The coordinator of ranks that run one after another."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def progress(self, amount):
        pass


def rewritten(make, world_size):
    """All ranks of a Rewriting; the bytes that each has written."""
    works = [make() for _ in range(world_size)]
    written = [0] * world_size
    try:
        token = works[0].begin([]).decode()
        for work in works:
            work.join(token)
        payloads = []
        for rank, work in reversed(list(enumerate(works))):  # no rank needs to be the first
            payloads.append(
                work.write(Ranks(rank, world_size), lambda n, rank=rank: put(written, rank, n))
            )
        works[0].commit(payloads[::-1])
    except BaseException:
        works[0].abandon()
        raise
    finally:
        for work in works:
            work.close()
    return written


def put(where, at, value):
    where[at] = value


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Odd sizes, so that elements and rows lie across the borders of blocks and of parts."""
    path = tmp_path_factory.mktemp("together") / "c"
    torch.manual_seed(0)
    state = {
        "flags": torch.rand(1_500_001) > 0.5,
        "odd": torch.rand(7, 300_007, dtype=torch.float64),
        "half": torch.rand(3, 5, 70_001).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
    }
    shardckpt.save(state, path)
    return str(path)


def contents(path):
    if os.path.isfile(path):
        with open(path, "rb") as file:
            return file.read()
    names = sorted(set(os.listdir(path)) - {"manifest.json"})
    return {name: contents(os.path.join(path, name)) for name in names}


def targets(name, opened, path):
    if name == "safetensors":
        return lambda: SafetensorsFile(opened, f"{path}.safetensors", overwrite=False)
    if name == "hf":
        return lambda: HuggingFace(opened, path, file_bytes=17 << 20, overwrite=False)
    options = {"shards": int(name), "storage": LocalStorage(), "overwrite": False}
    return lambda: reshard._Reshard(opened, path, **options)


@pytest.mark.parametrize("name", ["1", "2", "5", "safetensors", "hf"])
def test_many_ranks_write_what_one_does(tmp_path, source, name):
    suffix = ".safetensors" if name == "safetensors" else ""
    with open_source(source) as opened:
        total = sum(entry.size_bytes for entry in opened.manifest.tensors.values())
        for world_size in (1, 3, 8):
            path = f"{tmp_path}/{world_size}"
            written = rewritten(targets(name, opened, path), world_size)
            assert total <= sum(written) <= total + 5 * 4096
            assert max(written) <= total / world_size + 2 * BLOCK_BYTES
            assert contents(path + suffix) == contents(f"{tmp_path}/1{suffix}")
            if name.isdecimal():
                with shardckpt.open_checkpoint(path) as checkpoint:
                    checkpoint.verify()
    back = read_one(f"{path}{suffix}") if suffix else shardckpt.load_state(source)
    for key, value in shardckpt.load_state(source).items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("name", ["1", "safetensors", "hf"])
def test_a_part_that_fails(tmp_path, source, name, monkeypatch):
    """Nothing appears, whichever rank it is."""
    with open_source(source) as opened:
        read = opened.read_box

        def full(tensor, offsets, sizes):
            if tensor == "half":
                raise errors.NoSpaceError("planted")
            return read(tensor, offsets, sizes)

        monkeypatch.setattr(opened, "read_box", full)
        with pytest.raises(errors.NoSpaceError):
            rewritten(targets(name, opened, f"{tmp_path}/x"), 8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["1", "safetensors"])
def test_a_part_in_another_order(tmp_path, source, name):
    """The second rank lays the file out in another order than the others."""
    with open_source(source) as opened:
        make = targets(name, opened, f"{tmp_path}/x")
        works = [make() for _ in range(3)]
        new_file = works[1]._new_file

        def in_another_order(number):
            new = new_file(number)
            tensor, boxes = new.chunks.tensor[::-1].copy(), new.chunks.boxes[::-1].copy()
            return dataclasses.replace(new, chunks=ChunkTable(tensor=tensor, boxes=boxes))

        works[1]._new_file = in_another_order
        with pytest.raises(errors.ShardMismatchError) as caught:
            rewritten(iter(works).__next__, 3)
    assert caught.value.rank == 1
    assert os.listdir(tmp_path) == []


def test_a_sealed_file_of_which_a_bit_flips(tmp_path, source):
    """In the header, which elements alone would not tell, and in the data."""
    path = tmp_path / "x.safetensors"
    with open_source(source) as opened:
        rewritten(targets("safetensors", opened, f"{tmp_path}/x"), 2)
    data = bytearray(path.read_bytes())
    read_one(str(path))
    for at in (data.index(b"scalar") + 2, data.index(b"shardckpt.state") + 20, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(errors.CorruptionError):
            read_one(str(path))
