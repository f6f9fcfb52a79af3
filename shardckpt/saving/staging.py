"""Staging: copy the data of a local plan to CPU memory, which later saves reuse."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from shardckpt.config import current
from shardckpt.errors import StateError
from shardckpt.format.dtypes import memory_dtype
from shardckpt.io.buffers import (
    HUGE_PAGE_BYTES,
    Buffer,
    copy_bytes,
    page_locked,
    private_memory,
    request_huge_pages,
)
from shardckpt.io.devices import CopyStream, Mark, wait_for
from shardckpt.io.tensor_memory import check_memory
from shardckpt.plan.local_plan import LocalPlan
from shardckpt.plan.save_plan import layout_order
from shardckpt.plan.shard_layout import chunk_bytes
from shardckpt.state.file_groups import files_of
from shardckpt.state.local_chunks import has_file_layout
from shardckpt.torch_compat import foreach_copy

__all__ = ["StagingBuffer", "StagingPool", "stage", "staged_bytes"]

_PAGE_BYTES = 4096
_LARGE_BYTES = 256 << 10


def _rounded(size_bytes: int) -> int:
    """Round a size up to a multiple of a huge page."""
    return max(HUGE_PAGE_BYTES, size_bytes + -size_bytes % HUGE_PAGE_BYTES)


class StagingBuffer:
    """CPU memory for one staged state, page-locked if devices copy to it.

    The first staging uses ordinary pages. It would take several times as long on huge pages if a
    virtual machine must first get them from its host. Page-locked memory is on huge pages at once,
    as the kernel can't convert it later.
    """

    def __init__(self, size_bytes: int, *, locked: bool) -> None:
        self.size_bytes = self.used_bytes = size_bytes
        self.locked = locked
        self._views: tuple[Any, list[torch.Tensor]] = (None, [])
        self._buffer = page_locked(size_bytes) if locked else Buffer(private_memory(size_bytes))
        self._bytes = torch.frombuffer(self._buffer.view, dtype=torch.uint8)

    def use_huge_pages(self) -> None:
        """Ask for huge pages after the first staging, as disks then take more bytes in one
        request.
        """
        if not self.locked:
            request_huge_pages(self._buffer.view)

    def views(self, plan: LocalPlan) -> list[torch.Tensor]:
        """Return the memory for each row of the plan. The data of each file begins at a new
        page.
        """
        specs, chunks = (*plan.common, *plan.rank_only), plan.chunks
        dtypes = [specs[index].dtype for index in chunks.tensor.tolist()]
        shapes = [data.shape for data in plan.data]  # boxes do not show trailing dimensions of 1
        layout = (dtypes, shapes, chunks.pack(), plan.file_group.tobytes())
        if self._views[0] != layout:
            file = files_of(plan.file_group[chunks.tensor], chunk_bytes(specs, chunks))
            views: list[torch.Tensor] = [self._bytes] * len(chunks)
            end, last = 0, -1
            for row in layout_order(specs, chunks, file).tolist():
                data, dtype = plan.data[row], memory_dtype(dtypes[row])
                begin, last = end if file[row] == last else end + -end % _PAGE_BYTES, file[row]
                end = begin + data.numel() * dtype.itemsize
                views[row] = self._bytes[begin:end].view(dtype).view(data.shape)
            self._views = layout, views
        return self._views[1]


class StagingPool:
    """The buffers in use, up to a budget, and one spare buffer for the next save."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._used: list[int] = []  # the bytes of each buffer in use
        self._spare: StagingBuffer | None = None

    def take(self, size_bytes: int, *, locked: bool) -> StagingBuffer:
        """Return a buffer of at least the given size. Waits while the buffers in use fill the
        budget.

        Raises:
            StateError: No memory became free within SHARDCKPT_STALL_DEADLINE_S seconds.
        """
        size_bytes = _rounded(size_bytes)

        def is_free() -> bool:
            budget_bytes = current().staging_bytes or 2 * max([size_bytes, *self._used])
            return not self._used or sum(self._used) + size_bytes <= budget_bytes

        with self._changed:
            free = self._changed.wait_for(is_free, timeout=current().stall_deadline_s)
            if not free:
                raise StateError(
                    "No memory for staging became free",
                    expected=f"an earlier save to end within {current().stall_deadline_s:g} s",
                    actual=f"{sum(self._used)} bytes in use, {size_bytes} needed",
                    remedy="save less often, or raise SHARDCKPT_STAGING_BYTES",
                )
            buffer, self._spare = self._spare, None
            if buffer is None or buffer.size_bytes < size_bytes or buffer.locked != locked:
                buffer = StagingBuffer(size_bytes, locked=locked)
            buffer.used_bytes = size_bytes  # a larger buffer counts only for the bytes in use
            self._used.append(size_bytes)
            return buffer

    def give_back(self, buffer: StagingBuffer) -> None:
        """Take a buffer back. Its memory must not be used any more."""
        buffer.use_huge_pages()
        with self._changed:
            self._used.remove(buffer.used_bytes)
            if self._spare is None or self._spare.size_bytes < buffer.size_bytes:
                self._spare = buffer
            self._changed.notify_all()


def staged_bytes(plan: LocalPlan) -> int:
    """Return the size of a buffer that holds the plan's data."""
    size_bytes = sum(data.numel() * data.element_size() for data in plan.data)
    return size_bytes + _PAGE_BYTES * len(np.unique(plan.file_group))


def stage(
    plan: LocalPlan, buffer: StagingBuffer, submitted: Mapping[torch.device, Mark]
) -> tuple[LocalPlan, dict[torch.device, Mark]]:
    """Copy the plan's data into the buffer.

    Args:
        plan: The plan.
        buffer: The buffer.
        submitted: The result of submitted_work at the time of the snapshot. Copies from devices
            begin after that work.

    Returns:
        The same plan, with the copies as its data, and a mark for each device. The copies from the
        CPU have ended. Those from a device have ended when its mark passes.
    """
    views = buffer.views(plan)
    rows_of: dict[torch.device, list[int]] = {}
    large: list[int] = []
    specs = (*plan.common, *plan.rank_only)
    for row, (data, index) in enumerate(zip(plan.data, plan.chunks.tensor.tolist(), strict=True)):
        check_memory(data, name=specs[index].name)  # it may have been freed since the plan was made
        size_bytes = data.numel() * data.element_size()
        if size_bytes >= _LARGE_BYTES and has_file_layout(data, specs[index].dtype):
            large.append(row)
        else:
            rows_of.setdefault(data.device, []).append(row)
    pairs = {
        device: ([views[row] for row in rows], [plan.data[row] for row in rows])
        for device, rows in rows_of.items()
    }
    on_cpu = pairs.pop(torch.device("cpu"), ((), ()))
    streams = {device: CopyStream(device, submitted) for device in pairs}
    try:
        with torch.no_grad():
            for device, (to, of) in pairs.items():  # these copies run while the CPU copies
                streams[device].copy(to, of)
            marks = {device: stream.mark() for device, stream in streams.items()}
            for row in large:  # this is a sixth faster than a copy by torch
                data = plan.data[row]
                copy_bytes(views[row].data_ptr(), data.data_ptr(), data.nbytes)
            if on_cpu[0]:
                foreach_copy(*on_cpu)
    except BaseException:
        for stream in streams.values():  # the buffer is used again
            wait_for(stream.mark())
        raise
    return dataclasses.replace(plan, data=tuple(views)), marks
