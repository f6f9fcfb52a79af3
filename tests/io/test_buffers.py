"""Buffers on huge pages, and the elements of tensors as contiguous parts."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from shardckpt.errors import StalledError, UnsupportedLeafError
from shardckpt.io import buffers
from shardckpt.io.buffers import BUFFER_BYTES, HUGE_PAGE_BYTES, lease, page_locked
from shardckpt.io.tensor_memory import contiguous_pieces
from tests.device_states import (
    MIB,
)
from tests.stand_in_device import StandIn


def address_in(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@pytest.mark.parametrize("size_bytes", [1, 4096, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 5])
def test_private_memory_has_the_size_and_begins_at_a_huge_page(size_bytes):
    memory = buffers.private_memory(size_bytes)
    assert len(memory) == size_bytes
    assert address_in(memory) % HUGE_PAGE_BYTES == 0
    memory[0] = memory[-1] = 7
    assert memory[size_bytes - 1] == 7


def test_a_buffer_that_was_given_back_is_lent_again_and_never_twice_at_once():
    with lease(2) as first, lease(1) as second:
        addresses = {buffer.address for buffer in (*first, *second)}
        assert len(addresses) == 3
        assert all(len(buffer.view) == BUFFER_BYTES for buffer in first)
    with lease(3) as again:
        assert {buffer.address for buffer in again} == addresses


def test_buffers_come_back_after_an_error_and_few_are_kept():
    with pytest.raises(ZeroDivisionError), lease(buffers._KEEP + 2):
        raise ZeroDivisionError
    assert len(buffers._free) == buffers._KEEP


def test_a_forked_child_does_not_use_the_buffers_of_its_parent():
    with lease(1):
        pass
    assert buffers._free
    child = os.fork()
    if not child:
        os._exit(0 if not buffers._free else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert buffers._free


@pytest.mark.parametrize("size_bytes", [0, 1, buffers._SHORT_BYTES - 1, buffers._SHORT_BYTES + 3])
def test_a_copy_changes_the_bytes_of_the_target_alone(size_bytes):
    source = torch.randint(1, 255, (size_bytes,), dtype=torch.uint8)
    target = torch.zeros(size_bytes + 2, dtype=torch.uint8)
    buffers.copy_bytes(target.data_ptr() + 1, source.data_ptr(), size_bytes)
    assert target.tolist() == [0, *source.tolist(), 0]


def test_a_view_at_an_address_shares_its_memory():
    data = torch.zeros(4, dtype=torch.uint8)
    buffers.view_at(data.data_ptr() + 1, 2)[:] = b"ab"
    assert bytes(data.tolist()) == b"\0ab\0"


def test_a_contiguous_tensor_is_yielded_unchanged():
    tensor = torch.arange(6.0).reshape(2, 3)
    (part,) = contiguous_pieces(tensor)
    assert part is tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).reshape(3, 4).t(),
        lambda: torch.arange(12.0)[::3],
        lambda: torch.ones(1).expand(5),
        lambda: torch.complex(torch.ones(3), torch.ones(3)).conj(),
        lambda: torch.complex(torch.ones(3), torch.ones(3)).conj().imag,
        lambda: torch.tensor(3.0).expand(()),
    ],
    ids=["turned", "strided", "expanded", "conjugate", "negative", "scalar"],
)
def test_the_parts_of_a_view_are_its_elements_in_order(make):
    view = make()
    parts = list(contiguous_pieces(view))
    assert all(part.is_contiguous() and not part.is_conj() and not part.is_neg() for part in parts)
    joined = [number for part in parts for number in part.reshape(-1).tolist()]
    assert joined == view.resolve_conj().resolve_neg().reshape(-1).tolist()


@pytest.mark.parametrize("shape", [(3, 1 << 20), (1 << 20, 3), (1, 3, 1 << 20)])
def test_a_large_view_is_copied_by_parts_of_a_buffer(shape):
    base = torch.arange(2 * 3 * (1 << 20), dtype=torch.int32).reshape(*shape, 2)
    view = base[..., 0]
    parts = list(contiguous_pieces(view))
    assert len(parts) > 1
    assert max(part.nbytes for part in parts) <= BUFFER_BYTES
    assert torch.equal(torch.cat([part.reshape(-1) for part in parts]), view.reshape(-1))


def test_a_tensor_without_memory_is_refused():
    tensor = torch.ones(4)
    views = (tensor, tensor[::2])
    tensor.untyped_storage().resize_(0)
    for view in views:
        with pytest.raises(UnsupportedLeafError, match="does not own memory"):
            list(contiguous_pieces(view))


def test_memory_is_released_before_it_is_unmapped(late):
    memory = page_locked(3 * MIB)
    assert late.locked == {memory.address: 3 * MIB}  # not rounded up
    view = memory.view
    del memory
    assert not late.locked
    view[0] = 1  # still mapped: the view holds it


def test_accelerators_that_lock_only_memory_of_torch_use_that(late, monkeypatch):
    given = torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(StandIn, "page_locked_tensor", lambda self, size: given[:size])
    memory = page_locked(64)
    memory.view[5] = 9
    assert given[5] == 9
    assert memory.address == given.data_ptr()
    assert not late.locked


def test_locked_and_ordinary_buffers_are_kept_apart(late):
    with lease(1) as (plain,), lease(1, locked=True) as (locked,):
        assert plain.address not in late.locked
        assert late.locked[locked.address] == BUFFER_BYTES
    with lease(1, locked=True) as (again,):
        assert again is locked


def test_a_forked_child_releases_nothing(late):
    memory = page_locked(MIB)
    child = os.fork()
    if not child:
        del memory
        os._exit(0 if late.locked else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_buffers_of_a_copy_that_hangs_are_not_lent_again(late):
    with pytest.raises(StalledError), lease(1, locked=True) as (buffer,):
        raise StalledError("A copy hangs")
    with lease(1, locked=True) as (other,):
        assert other is not buffer
    buffers._abandoned.clear()
