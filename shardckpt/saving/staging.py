"""Staging: a local plan's data copied into one piece of CPU memory, reused from save to save."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import torch

from shardckpt.config import current
from shardckpt.errors import StateError
from shardckpt.format.dtypes import memory_dtype
from shardckpt.io.buffers import HUGE_PAGE_BYTES, ask_for_huge_pages, copy_bytes, private_memory
from shardckpt.io.tensor_memory import check_memory
from shardckpt.plan.local_plan import LocalPlan
from shardckpt.plan.save_plan import layout_order
from shardckpt.plan.shard_layout import chunk_bytes
from shardckpt.state.file_groups import files_of
from shardckpt.state.local_chunks import lies_as_saved

__all__ = ["Image", "ImagePool", "current_events", "stage", "staged_bytes"]

_PAGE_BYTES = 4096
_LARGE_BYTES = 256 << 10


def _rounded(size_bytes: int) -> int:
    """To whole huge pages."""
    return max(HUGE_PAGE_BYTES, size_bytes + -size_bytes % HUGE_PAGE_BYTES)


class Image:
    """CPU memory for one staged state; page-locked where accelerators copy into it.

    Its first pages are ordinary ones: fresh huge pages may be memory that the host of a virtual
    machine has yet to give, which makes a first staging take several times as long.
    """

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self.size_bytes = self.used_bytes = size_bytes
        self.pinned = pinned
        self._views: tuple[Any, list[torch.Tensor]] = (None, [])
        if pinned:
            self._bytes = torch.empty(self.size_bytes, dtype=torch.uint8, pin_memory=True)
            return
        self._memory = private_memory(size_bytes)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def settle(self) -> None:
        """Once it has been filled: from huge pages the disk takes more at once."""
        if not self.pinned:
            ask_for_huge_pages(self._memory)

    def views(self, plan: LocalPlan) -> list[torch.Tensor]:
        """Where each row of the plan goes: in the order of the files, each from a page's start."""
        specs, chunks = (*plan.common, *plan.own), plan.chunks
        dtypes = [specs[index].dtype for index in chunks.tensor.tolist()]
        layout = (dtypes, chunks.pack(), plan.kind.tobytes())
        if self._views[0] != layout:
            file = files_of(plan.kind[chunks.tensor], chunk_bytes(specs, chunks))
            views: list[torch.Tensor] = [self._bytes] * len(chunks)
            end, last = 0, -1
            for row in layout_order(specs, chunks, file).tolist():
                data, dtype = plan.data[row], memory_dtype(dtypes[row])
                begin, last = end if file[row] == last else end + -end % _PAGE_BYTES, file[row]
                end = begin + data.numel() * dtype.itemsize
                views[row] = self._bytes[begin:end].view(dtype).view(data.shape)
            self._views = layout, views
        return self._views[1]


class ImagePool:
    """Images in use, up to a budget, and one kept for the next save."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._used_bytes = 0
        self._spare: Image | None = None

    def take(self, size_bytes: int, *, pinned: bool) -> Image:
        """An image of that size; waits while those in use fill the budget.

        Raises StateError when none comes free within STALL_DEADLINE_S.
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
                    "No memory to stage the state in came free",
                    expected=f"an earlier save to end within {current().stall_deadline_s:g} s",
                    actual=f"{self._used_bytes} bytes in use, {size_bytes} needed",
                    remedy="save less often, or raise SHARDCKPT_STAGING_BYTES",
                )
            image, self._spare = self._spare, None
            if image is None or image.size_bytes < size_bytes or image.pinned != pinned:
                image = Image(size_bytes, pinned=pinned)
            image.used_bytes = size_bytes  # a larger one that is at hand counts for what it holds
            self._used_bytes += size_bytes
            return image

    def give_back(self, image: Image) -> None:
        """Take it back; nothing may look into it any more."""
        image.settle()
        with self._changed:
            self._used_bytes -= image.used_bytes
            if self._spare is None or self._spare.size_bytes < image.size_bytes:
                self._spare = image
            self._changed.notify_all()


def staged_bytes(plan: LocalPlan) -> int:
    """The size of an image that holds the plan's data."""
    size_bytes = sum(data.numel() * data.element_size() for data in plan.data)
    return size_bytes + _PAGE_BYTES * len(np.unique(plan.kind))


def current_events() -> dict[torch.device, Any]:
    """An event on the current stream of each CUDA device in use: what is there by now has been
    computed once it has come to pass."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    return {
        torch.device("cuda", index): torch.cuda.current_stream(index).record_event()
        for index in range(torch.cuda.device_count())
        if torch.cuda.memory_allocated(index)
    }


def stage(plan: LocalPlan, image: Image, events: dict[torch.device, Any]) -> LocalPlan:
    """Copy the plan's data into the image; the same plan over the copies. Done when it returns.

    `events` are those of the moment that the plan is of.
    """
    views = image.views(plan)
    devices: dict[torch.device, list[int]] = {}
    specs = (*plan.common, *plan.own)
    for row, (data, index) in enumerate(zip(plan.data, plan.chunks.tensor.tolist(), strict=True)):
        check_memory(data, name=specs[index].name)  # it may have been freed since it was planned
        size_bytes = data.numel() * data.element_size()
        if size_bytes >= _LARGE_BYTES and lies_as_saved(data, specs[index].dtype):
            # A sixth faster than torch copies.
            copy_bytes(views[row].data_ptr(), data.data_ptr(), size_bytes)
        else:
            devices.setdefault(data.device, []).append(row)
    with torch.no_grad():
        for device, rows in devices.items():
            to, of = [views[row] for row in rows], [plan.data[row] for row in rows]
            if device.type != "cuda":
                # One call, which leaves the interpreter lock alone; semi-public, torch 2.13.
                torch._foreach_copy_(to, of)
                continue
            stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device in events:
                stream.wait_event(events[device])
            with torch.cuda.stream(stream):
                torch._foreach_copy_(to, of, non_blocking=True)
            stream.synchronize()
    return dataclasses.replace(plan, data=tuple(views))
