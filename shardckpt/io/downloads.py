"""Downloads: tensors of devices as pieces of page-locked memory, copied one buffer ahead."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping

import torch

from shardckpt.io.buffers import BUFFER_BYTES, Buffer, lease
from shardckpt.io.devices import CopyStream, Mark, wait_for
from shardckpt.io.tensor_memory import check_memory, parts

__all__ = ["host_pieces"]

_BUFFERS = 2  # one is used while the other one is filled
_LARGE_BYTES = 256 << 10  # a larger CPU tensor is not copied

Batch = list[torch.Tensor]


def host_pieces(
    tensors: Iterable[torch.Tensor], submitted: Mapping[torch.device, Mark]
) -> Generator[torch.Tensor, None, None]:
    """Yield the elements of tensors on any device, in order, as contiguous CPU tensors.

    Copies from devices run one buffer ahead, on streams of their own. Close the generator if it is
    not used up.

    Args:
        tensors: The tensors. They must not change meanwhile.
        submitted: The result of submitted_work. The copies begin after that work.

    Yields:
        A tensor that is valid until the next one is asked for. It may hold several tensors, as
        bytes.

    Raises:
        UnsupportedLeafError: A tensor does not own memory.
        StalledError: A copy did not end in time.
    """
    with lease(_BUFFERS, locked=True) as buffers:
        ring = itertools.cycle(buffers)
        streams: dict[torch.device, CopyStream] = {}
        try:
            ahead: tuple[torch.Tensor, list[Mark]] | None = None
            for batch in _batches(tensors):
                if _stays(batch[0]):
                    filled: tuple[torch.Tensor, list[Mark]] = batch[0], []
                else:
                    for device in {part.device for part in batch if not part.is_cpu}:
                        if device not in streams:
                            streams[device] = CopyStream(device, submitted)
                    filled = _fill(next(ring), batch, streams)
                if ahead:
                    yield _finished(*ahead)
                ahead = filled
            if ahead:
                yield _finished(*ahead)
        finally:  # the buffers are free again when no copy runs
            for stream in streams.values():
                wait_for(stream.mark())


def _batches(tensors: Iterable[torch.Tensor]) -> Iterator[Batch]:
    """Group the parts of tensors into batches of at most BUFFER_BYTES."""
    batch: Batch = []
    size_bytes = 0
    for tensor in tensors:
        check_memory(tensor)
        for part in [tensor] if _stays(tensor) else parts(tensor.detach()):
            if not part.numel():
                continue
            if batch and (size_bytes + part.nbytes > BUFFER_BYTES or _stays(part)):
                yield batch
                batch, size_bytes = [], 0
            batch.append(part)
            size_bytes += part.nbytes
            if _stays(part):
                yield batch
                batch, size_bytes = [], 0
    if batch:
        yield batch


def _stays(tensor: torch.Tensor) -> bool:
    """Whether a tensor is yielded itself."""
    return (
        tensor.is_cpu
        and tensor.nbytes > _LARGE_BYTES
        and tensor.is_contiguous()
        and not (tensor.is_neg() or tensor.is_conj())
    )


def _fill(
    buffer: Buffer, batch: Batch, streams: Mapping[torch.device, CopyStream]
) -> tuple[torch.Tensor, list[Mark]]:
    """Begin to copy a batch into a buffer. Returns its bytes, and the marks of the copies."""
    by_device: dict[torch.device, tuple[Batch, Batch]] = {}
    at = 0
    for part in batch:
        held = torch.frombuffer(buffer.view, dtype=part.dtype, count=part.numel(), offset=at)
        targets, sources = by_device.setdefault(part.device, ([], []))
        targets.append(held.view(part.shape))
        sources.append(part)
        at += part.nbytes
    marks = []
    for device, (targets, sources) in by_device.items():
        if device in streams:
            streams[device].copy(targets, sources)
            marks.append(streams[device].mark())
    for target, source in zip(*by_device.get(torch.device("cpu"), ((), ())), strict=True):
        target.copy_(source)
    return torch.frombuffer(buffer.view, dtype=torch.uint8, count=at), marks


def _finished(data: torch.Tensor, marks: list[Mark]) -> torch.Tensor:
    for mark in marks:
        wait_for(mark)
    return data
