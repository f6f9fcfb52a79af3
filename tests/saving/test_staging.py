"""Memory for staged states, and the copies in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.format.entries import TensorEntry
from shardckpt.io.buffers import have_huge_pages
from shardckpt.io.tensor_memory import contiguous_pieces
from shardckpt.plan.local_plan import local_plan
from shardckpt.plan.read_plan import plan_reads
from shardckpt.saving.staging import StagingBuffer, StagingPool, stage, staged_bytes
from shardckpt.state.flatten import flatten
from shardckpt.state.local_chunks import LocalChunk
from tests.device_states import (
    staged,
)


def test_staging_memory_is_used_again(monkeypatch):
    monkeypatch.setenv("SHARDCKPT_STAGING_BYTES", str(1 << 30))
    pool = StagingPool()
    first = pool.take(5 << 20, locked=False)
    pool.give_back(first)
    again = pool.take(4 << 20, locked=False)
    assert again is first
    other = pool.take(3 << 20, locked=False)
    assert other is not first
    pool.give_back(other)
    pool.give_back(again)
    assert pool.take(1, locked=False) is first


def memory_flags(address):
    """Return the facts of the kernel about the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            low, _, high = first.partition("-")
            inside = int(low, 16) <= address < int(high, 16)
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not have_huge_pages(), reason="the kernel reports no huge pages")
def test_a_first_staging_takes_ordinary_pages():
    pool = StagingPool()
    buffer = pool.take(5 << 20, locked=False)
    address = buffer._bytes.data_ptr() + (4 << 20)
    assert {"hg", "dc"} & set(memory_flags(address)) == {"dc"}
    pool.give_back(buffer)
    assert {"hg", "dc"} <= set(memory_flags(address))


def test_a_large_spare_does_not_use_up_the_budget(monkeypatch):
    monkeypatch.setenv("SHARDCKPT_STALL_DEADLINE_S", str(0.1))
    pool = StagingPool()
    pool.give_back(pool.take(9 << 20, locked=False))
    pool.take(1, locked=False)
    pool.take(1, locked=False)  # there is room for two like this


def test_a_small_save_does_not_wait_for_a_large_one(monkeypatch):
    monkeypatch.setenv("SHARDCKPT_STALL_DEADLINE_S", str(0.1))
    pool = StagingPool()
    large = pool.take(9 << 20, locked=False)
    pool.take(1, locked=False)  # there is room for two like the large one
    with pytest.raises(errors.StateError, match="memory"):
        pool.take(9 << 20, locked=False)
    pool.give_back(large)
    pool.take(9 << 20, locked=False)


def test_staging_memory_that_never_comes_free_is_an_error(monkeypatch):
    monkeypatch.setenv("SHARDCKPT_STALL_DEADLINE_S", str(0.1))
    monkeypatch.setenv("SHARDCKPT_STAGING_BYTES", str(1))
    pool = StagingPool()
    pool.take(1, locked=False)
    with pytest.raises(errors.StateError, match="memory"):
        pool.take(1, locked=False)


def test_memory_that_is_freed_after_planning_is_not_touched():
    tensor = torch.ones(1 << 18)
    part = tensor[:4]
    plan = local_plan(flatten({"w": tensor}, rank=0), world_size=1)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(errors.UnsupportedLeafError, match="w"):
        stage(plan, StagingBuffer(staged_bytes(plan), locked=False), {})
    with pytest.raises(errors.UnsupportedLeafError):
        list(contiguous_pieces(tensor))
    entry = TensorEntry(dtype="F32", shape=(4,), chunks=np.array([[0, 0, 16, 0, 4]]))
    with pytest.raises(errors.UnsupportedLeafError):
        plan_reads([(entry, LocalChunk((0,), (4,), part))])


def test_a_conjugate_beside_its_base_is_staged_as_itself(tmp_path):
    base = torch.complex(torch.ones(2), torch.ones(2))
    state = {"base": base, "conjugate": base.conj(), "negative": base.conj().imag}
    shardckpt.async_save(state, tmp_path / "c").result(60)
    found = shardckpt.load_state(tmp_path / "c")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_memory_is_used_again_for_tensors_with_other_dimensions_of_size_1(tmp_path):
    for step, shape in enumerate([(2, 3), (2, 3, 1), (1, 2, 3), (2, 1, 3)]):
        state = {"x": torch.rand(shape), "other": torch.rand(1, 1, 1)}
        shardckpt.async_save(state, tmp_path / str(step)).result()
        assert torch.equal(shardckpt.load_state(tmp_path / str(step))["x"], state["x"])


def test_a_staged_plan_has_the_same_tensors_in_memory_of_its_own():
    turned = torch.arange(6).reshape(2, 3).t()
    state = {"w": torch.arange(70_000.0), "turned": turned, "s": torch.tensor(2)}
    plan = local_plan(flatten(state, rank=0), world_size=1)
    buffer = StagingBuffer(staged_bytes(plan), locked=False)
    staged, marks = stage(plan, buffer, {})
    assert not marks
    before = [data.clone() for data in plan.data]
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(staged.data, before, strict=True))
    assert staged.common == plan.common
    begin = buffer._bytes.data_ptr()
    assert all(begin <= d.data_ptr() < begin + buffer.size_bytes for d in staged.data)
    again, _ = stage(plan, buffer, {})
    assert [d.data_ptr() for d in again.data] == [d.data_ptr() for d in staged.data]


def test_a_state_on_two_devices_and_the_cpu_is_staged(machine):
    assert staged(machine)
