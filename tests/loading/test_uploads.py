"""Verified bytes are copied to tensors of devices, although their memory is still in use."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt.io.buffers import lease
from shardckpt.loading.uploads import Uploads
from shardckpt.plan.read_plan import CopyRead, plan_reads
from shardckpt.state.local_chunks import LocalChunk
from tests.device_states import (
    filled,
    in_use,
    samples,
    values,
)
from tests.stand_in_device import raw, to_device


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices") / "c"
    shardckpt.save(samples(), folder)
    return folder


def test_a_load_fills_tensors_of_devices(machine, saved):
    assert filled(saved, samples(), in_use(machine, samples()))


def test_one_window_fills_tensors_of_devices(machine, tmp_path):
    few = {name: samples()[name] for name in ("small", "tiny", "scalar", "bytes")}
    shardckpt.save(few, tmp_path / "c")
    assert filled(tmp_path / "c", few, in_use(machine, few))


@pytest.mark.parametrize(
    "target",
    [
        lambda t: torch.zeros(t.shape, dtype=torch.float64),
        lambda t: torch.zeros(t.shape[::-1]).t(),
        lambda t: torch.zeros(2 * len(t), *t.shape[1:])[::2],
    ],
    ids=["cast", "turned", "strided"],
)
def test_the_device_casts_and_places_elements(machine, saved, target):
    expected = {name: samples()[name] for name in ("large", "small")}
    targets = {name: to_device(target(t)) for name, t in expected.items()}
    cast = {name: t.to(targets[name].dtype) for name, t in expected.items()}
    assert filled(saved, cast, targets)


def test_many_small_tensors_are_one_copy_to_the_device(late, tmp_path):
    state = {f"w{n:03}": values(n, 50) for n in range(300)}
    shardckpt.save(state, tmp_path / "c")
    assert filled(tmp_path / "c", state, in_use(late, state))
    sizes = [entry[2] for entry in late.log if entry[0] == "copied"]
    assert sum(size > 200 for size in sizes) == 2  # to each of the two devices
    assert sum(size == 200 for size in sizes) == 300


def test_large_tensors_go_to_the_device_once(late, tmp_path):
    state = {"w": values(1, 2500, 5001)}
    shardckpt.save(state, tmp_path / "c")
    assert filled(tmp_path / "c", state, in_use(late, state))
    total = sum(entry[2] for entry in late.log if entry[0] == "copied")
    assert total == state["w"].nbytes


def test_elements_that_are_not_aligned_are_moved_first(machine, tmp_path):
    state = {"bytes": values(1, 3, dtype=torch.uint8), "w": values(2, 9), "x": values(3, 5)}
    shardckpt.save(state, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        entries = checkpoint.manifest.tensors
        assert filled(tmp_path / "c", state, in_use(machine, state))
    reads = plan_reads([(entries["w"], LocalChunk((0,), (9,), to_device(torch.zeros(9))))]).copies
    from shardckpt.loading.uploads import _part

    (read,) = reads
    moved = torch.zeros(64, dtype=torch.uint8)
    shift = type(read)(0, 5, 41, read.dtype, read.sizes, read.strides, read.into)
    moved[5:41] = state["w"].view(torch.uint8)
    assert torch.equal(_part(moved, 0, shift), state["w"])


def test_a_group_of_pieces_may_begin_at_any_byte(late):
    """Elements are aligned in the file, and stay so in the copy on the device."""
    data = torch.arange(64, dtype=torch.uint8)
    targets = {torch.uint8: torch.zeros(3, dtype=torch.uint8), torch.float32: torch.zeros(4)}
    there = {dtype: to_device(target) for dtype, target in targets.items()}
    reads = [
        CopyRead(0, 5, 8, torch.uint8, (3,), (1,), there[torch.uint8]),
        CopyRead(0, 8, 24, torch.float32, (4,), (1,), there[torch.float32]),
    ]
    uploads = Uploads(reads)
    with lease(1, locked=True) as (buffer,):
        buffer.view[:64] = data.numpy().tobytes()
        uploads.begin(buffer, 0, reads)
        uploads.wait(buffer)
    assert uploads.needed
    assert raw(there[torch.uint8]).tolist() == [5, 6, 7]
    assert torch.equal(raw(there[torch.float32]), data[8:24].view(torch.float32))


def test_nothing_is_uploaded_to_the_cpu():
    reads = [CopyRead(0, 0, 4, torch.float32, (1,), (1,), torch.zeros(1))]
    assert not Uploads(reads).needed
