"""The files of one rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardckpt.errors import StorageError
from shardckpt.format.safetensors_header import parse_header
from shardckpt.plan.local_plan import ChunkTable, TensorSpec, local_plan, pad_boxes
from shardckpt.plan.save_plan import RankWrites, global_plan
from shardckpt.saving.rank_writer import RankShards, layout, write_rank
from shardckpt.state.flatten import flatten


class File:
    direct = False

    def __init__(self, files, name, size_bytes):
        self.files, self.name, self.data = files, name, bytearray(size_bytes)
        self.closed = self.discarded = False

    def write(self, view, *, offset):
        self.data[offset : offset + len(view)] = view

    def close(self, *, size_bytes):
        self.closed = len(self.data) == size_bytes

    def discard(self):
        self.discarded = True


class Transaction:
    """A transaction in memory."""

    path = "memory"

    def __init__(self):
        self.files = {}

    def create(self, name, *, size_bytes):
        self.files[name] = File(self.files, name, size_bytes)
        return self.files[name]


def shards_of(state, *, ranks=1, rank=0):
    plan = local_plan(flatten(state, rank=rank), world_size=ranks)
    writes = RankWrites.of(plan, global_plan([plan] * ranks).shares[rank])
    return RankShards.of(plan, writes, rank=rank, world_size=ranks)


def read(data):
    """name -> bytes of the tensors in a shard."""
    length = 8 + int.from_bytes(data[:8], "little")
    tensors, _ = parse_header(bytes(data[:length]), file_size_bytes=len(data), path="p")
    return {t.name: bytes(data[t.begin : t.end]) for t in tensors}


def test_a_file_holds_the_bytes_of_its_tensors():
    state = {"w": torch.arange(6.0).reshape(2, 3), "s": torch.tensor(3, dtype=torch.int16)}
    transaction, seen = Transaction(), []
    result = write_rank(transaction, shards_of(state), progress=seen.append)
    (file,) = result.files
    assert file.name == "shard-00000-of-00001.safetensors"
    assert (file.chunks, file.linked_bytes) == (2, 0)
    written = transaction.files[file.name]
    assert written.closed
    assert len(written.data) == file.size_bytes == result.size_bytes == seen[-1]
    assert read(written.data) == {name: t.numpy().tobytes() for name, t in state.items()}
    assert set(result.seconds) == {"sync"}


def test_two_ranks_write_all_rows_of_a_large_replicated_tensor_between_them():
    state, found = {"w": torch.arange(2_000_000.0).reshape(2000, 1000)}, b""
    for rank in range(2):
        transaction = Transaction()
        (file,) = write_rank(transaction, shards_of(state, ranks=2, rank=rank)).files
        (part,) = read(transaction.files[file.name].data).values()
        assert len(part) == 4_000_000
        found += part
    assert found == state["w"].numpy().tobytes()


def test_a_tensor_that_is_resized_after_the_plan_is_an_error_and_the_file_is_discarded():
    shards = shards_of({"w": torch.ones(4)})
    transaction = Transaction()
    resized = RankShards(
        rank=0,
        world_size=1,
        specs=shards.specs,
        chunks=shards.chunks,
        files=shards.files,
        data=lambda rows: [torch.ones(3)],
    )
    with pytest.raises(StorageError, match="planned size") as caught:
        write_rank(transaction, resized)
    assert caught.value.path == "memory/shard-00000-of-00001.safetensors"
    (file,) = transaction.files.values()
    assert file.discarded
    assert not file.closed


def test_a_layout_is_the_same_for_each_save_and_is_remembered():
    shards = shards_of({"w": torch.ones(4), "c": torch.ones(2, dtype=torch.complex128)})
    first, second = Transaction(), Transaction()
    write_rank(first, shards)
    assert len(shards.layouts) == 1
    (known,) = shards.layouts.values()
    assert known == layout(shards.specs, shards.chunks)
    write_rank(second, shards)
    (one,), (two,) = first.files.values(), second.files.values()
    assert one.data == two.data


def test_a_header_names_the_dtype_of_a_tensor_that_is_stored_as_another():
    specs = [TensorSpec("c", "C128", (4,)), TensorSpec("f", "F32", ())]
    chunks = ChunkTable(tensor=np.array([0, 1]), boxes=pad_boxes([((1,), (2,)), ((), ())]))
    header, size_bytes, _ = layout(specs, chunks)
    tensors, facts = parse_header(header, file_size_bytes=size_bytes, path="p")
    assert [(t.dtype, t.shape) for t in tensors] == [("F64", (2, 2)), ("F32", ())]
    assert facts["dtypes"] == '{"c":"C128"}'
    assert size_bytes == len(header) + 32 + 4
