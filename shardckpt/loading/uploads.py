"""Uploads: copies from the buffers of a load to tensors of devices, while other buffers are filled.

Each piece of a large tensor is one copy. Small pieces, and pieces that are cast or strided, go to
the device together, as one copy of the part of the buffer that holds them. The device then copies
them into their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardckpt.io.buffers import Buffer
from shardckpt.io.devices import CopyStream, Mark, submitted_work, wait_for
from shardckpt.plan.read_plan import CopyRead

__all__ = ["Uploads", "elements_at"]

_LARGE_BYTES = 128 << 10
_ALIGN = 16  # the size of the largest dtype, in bytes


class Uploads:
    """Copies to the devices of the given reads. They begin after the work submitted so far.

    Args:
        copies: The reads. Create the object in the thread that has submitted work to the devices.

    Attributes:
        needed: Whether any read goes to a device.
    """

    def __init__(self, copies: Sequence[CopyRead]) -> None:
        devices = {copy.into.device for copy in copies if not copy.into.is_cpu}
        self.needed = bool(devices)
        submitted = submitted_work() if devices else {}
        self._streams = {device: CopyStream(device, submitted) for device in devices}
        # The marks by the address of the buffer, with the memory that the copies use meanwhile.
        self._running: dict[int, list[tuple[Mark, list[torch.Tensor]]]] = {}

    def begin(self, buffer: Buffer, base: int, reads: Sequence[CopyRead]) -> None:
        """Begin to copy from a buffer, which begins at byte `base` of a shard. See wait."""
        by_device: dict[torch.device, list[CopyRead]] = {}
        for read in reads:
            by_device.setdefault(read.into.device, []).append(read)
        running = self._running.setdefault(buffer.address, [])
        for device, own in by_device.items():
            stream = self._streams[device]
            memory: list[torch.Tensor] = []
            try:
                with torch.inference_mode():  # the views need no autograd
                    memory += _copy(stream, buffer, base, own)
            finally:
                running.append((stream.mark(), memory))

    def wait(self, buffer: Buffer) -> None:
        """Wait until the copies from a buffer have ended.

        Raises:
            StalledError: They did not end in time.
        """
        for mark, _ in self._running.pop(buffer.address, ()):
            wait_for(mark)


def _copy(
    stream: CopyStream, buffer: Buffer, base: int, reads: Sequence[CopyRead]
) -> list[torch.Tensor]:
    """Begin to copy. Returns the memory that the copies use."""
    groups = _groups(reads)
    alone = [group[0] for group in groups if len(group) == 1 and _has_file_layout(group[0])]
    stream.copy(
        [read.into for read in alone],
        [elements_at(buffer, read.begin - base, read).view(read.sizes) for read in alone],
    )
    memory = []
    for group in groups:
        if len(group) == 1 and _has_file_layout(group[0]):
            continue
        low = group[0].begin // _ALIGN * _ALIGN
        size_bytes = max(read.end for read in group) - low
        here = torch.frombuffer(buffer.view, dtype=torch.uint8, count=size_bytes, offset=low - base)
        there = stream.empty(size_bytes)
        stream.copy([there], [here])
        with stream.current():
            parts = [_part(there, low, read) for read in group]
        stream.copy([read.into for read in group], parts)
        memory.append(there)
    return memory


def _groups(reads: Sequence[CopyRead]) -> list[list[CopyRead]]:
    """Group small neighbours. Large pieces with the layout of the file are alone."""
    groups: list[list[CopyRead]] = []
    end = -_LARGE_BYTES  # of the last group, if more pieces may join it
    for read in sorted(reads, key=lambda read: read.begin):
        large = read.end - read.begin >= _LARGE_BYTES and _has_file_layout(read)
        if large or read.begin - end >= _LARGE_BYTES:
            groups.append([])
            end = -_LARGE_BYTES
        groups[-1].append(read)
        end = -_LARGE_BYTES if large else max(end, read.end)
    return groups


def _has_file_layout(read: CopyRead) -> bool:
    """Whether the bytes of a piece are those of its tensor."""
    into = read.into
    return (
        into.dtype == read.dtype
        and into.is_contiguous()
        and into.nbytes == read.end - read.begin
        and not into.is_conj()
        and not into.is_neg()
    )


def _part(there: torch.Tensor, low: int, read: CopyRead) -> torch.Tensor:
    """Return the box of a read. `there` holds the bytes of a shard from byte `low` on."""
    held = there[read.begin - low : read.end - low]
    if read.begin % read.dtype.itemsize:  # devices can't read elements that are not aligned
        held = held.clone()
    return held.view(read.dtype).as_strided(read.sizes, read.strides)


def elements_at(buffer: Buffer, offset: int, read: CopyRead) -> torch.Tensor:
    """Return the elements of a read as a flat tensor. They lie at an offset of the buffer."""
    count = (read.end - read.begin) // read.dtype.itemsize
    return torch.frombuffer(buffer.view, dtype=read.dtype, count=count, offset=offset)
