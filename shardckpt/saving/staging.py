"""Staging: copy the data of a local plan to CPU memory, which later saves reuse."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import torch

from shardckpt.config import current
from shardckpt.errors import StateError
from shardckpt.format.dtypes import memory_dtype
from shardckpt.io.buffers import HUGE_PAGE_BYTES, copy_bytes, private_memory, request_huge_pages
from shardckpt.io.tensor_memory import check_memory
from shardckpt.plan.local_plan import LocalPlan
from shardckpt.plan.save_plan import layout_order
from shardckpt.plan.shard_layout import chunk_bytes
from shardckpt.state.file_groups import files_of
from shardckpt.state.local_chunks import has_file_layout
from shardckpt.torch_compat import foreach_copy

__all__ = ["StagingBuffer", "StagingPool", "current_events", "stage", "staged_bytes"]

_PAGE_BYTES = 4096
_LARGE_BYTES = 256 << 10


def _rounded(size_bytes: int) -> int:
    """Round a size up to a multiple of a huge page."""
    return max(HUGE_PAGE_BYTES, size_bytes + -size_bytes % HUGE_PAGE_BYTES)


class StagingBuffer:
    """CPU memory for one staged state, page-locked if accelerators copy to it.

    The first staging uses ordinary pages. It would take several times as long on huge pages if a
    virtual machine must first get them from its host.
    """

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self.size_bytes = self.used_bytes = size_bytes
        self.pinned = pinned
        self._views: tuple[Any, list[torch.Tensor]] = (None, [])
        if pinned:
            self._bytes = torch.empty(
                self.size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True
            )
            return
        self._memory = private_memory(size_bytes)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def use_huge_pages(self) -> None:
        """Ask for huge pages after the first staging, as disks then take more bytes in one
        request.
        """
        if not self.pinned:
            request_huge_pages(self._memory)

    def views(self, plan: LocalPlan) -> list[torch.Tensor]:
        """Return the memory for each row of the plan. The data of each file begins at a new
        page.
        """
        specs, chunks = (*plan.common, *plan.rank_only), plan.chunks
        dtypes = [specs[index].dtype for index in chunks.tensor.tolist()]
        layout = (dtypes, chunks.pack(), plan.file_group.tobytes())
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
        self._used_bytes = 0
        self._spare: StagingBuffer | None = None

    def take(self, size_bytes: int, *, pinned: bool) -> StagingBuffer:
        """Return a buffer of at least the given size. Waits while the buffers in use fill the
        budget.

        Raises:
            StateError: No memory became free within SHARDCKPT_STALL_DEADLINE_S seconds.
        """
        size_bytes = _rounded(size_bytes)
        budget_bytes = current().staging_bytes or 2 * size_bytes
        with self._changed:
            free = self._changed.wait_for(
                lambda: not self._used_bytes or self._used_bytes + size_bytes <= budget_bytes,
                timeout=current().stall_deadline_s,
            )
            if not free:
                raise StateError(
                    "No memory for staging became free",
                    expected=f"an earlier save to end within {current().stall_deadline_s:g} s",
                    actual=f"{self._used_bytes} bytes in use, {size_bytes} needed",
                    remedy="save less often, or raise SHARDCKPT_STAGING_BYTES",
                )
            buffer, self._spare = self._spare, None
            if buffer is None or buffer.size_bytes < size_bytes or buffer.pinned != pinned:
                buffer = StagingBuffer(size_bytes, pinned=pinned)
            buffer.used_bytes = size_bytes  # a larger buffer counts only for the bytes in use
            self._used_bytes += size_bytes
            return buffer

    def give_back(self, buffer: StagingBuffer) -> None:
        """Take a buffer back. Its memory must not be used any more."""
        buffer.use_huge_pages()
        with self._changed:
            self._used_bytes -= buffer.used_bytes
            if self._spare is None or self._spare.size_bytes < buffer.size_bytes:
                self._spare = buffer
            self._changed.notify_all()


def staged_bytes(plan: LocalPlan) -> int:
    """Return the size of a buffer that holds the plan's data."""
    size_bytes = sum(data.numel() * data.element_size() for data in plan.data)
    return size_bytes + _PAGE_BYTES * len(np.unique(plan.file_group))


def current_events() -> dict[torch.device, Any]:
    """Record an event on the current stream of each CUDA device in use.

    Returns:
        The event of each device. It passes when all work that was submitted before is done.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    return {
        torch.device("cuda", index): torch.cuda.current_stream(index).record_event()
        for index in range(torch.cuda.device_count())
        if torch.cuda.memory_allocated(index)
    }


def stage(plan: LocalPlan, buffer: StagingBuffer, events: dict[torch.device, Any]) -> LocalPlan:
    """Copy the plan's data into the buffer. The copy is complete when this returns.

    Args:
        plan: The plan.
        buffer: The buffer.
        events: The events of the time of the snapshot. Copies wait for them.

    Returns:
        The same plan, with the copies as its data.
    """
    views = buffer.views(plan)
    devices: dict[torch.device, list[int]] = {}
    specs = (*plan.common, *plan.rank_only)
    for row, (data, index) in enumerate(zip(plan.data, plan.chunks.tensor.tolist(), strict=True)):
        check_memory(data, name=specs[index].name)  # it may have been freed since the plan was made
        size_bytes = data.numel() * data.element_size()
        if size_bytes >= _LARGE_BYTES and has_file_layout(data, specs[index].dtype):
            # This is a sixth faster than a copy by torch.
            copy_bytes(views[row].data_ptr(), data.data_ptr(), size_bytes)
        else:
            devices.setdefault(data.device, []).append(row)
    with torch.no_grad():
        for device, rows in devices.items():
            to, of = [views[row] for row in rows], [plan.data[row] for row in rows]
            if device.type != "cuda":
                foreach_copy(to, of)
                continue
            stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device in events:
                stream.wait_event(events[device])
            with torch.cuda.stream(stream):
                foreach_copy(to, of, non_blocking=True)
            stream.synchronize()
    return dataclasses.replace(plan, data=tuple(views))
