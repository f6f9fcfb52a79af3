"""Tensors on the stand-in for an accelerator, and whether saves and loads of them are right."""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import torch

import shardckpt
from shardckpt.format.digests import BLOCK_BYTES, block_digest
from shardckpt.io import buffers, devices
from shardckpt.loading import shard_reader
from shardckpt.plan.local_plan import local_plan
from shardckpt.plan.read_plan import plan_reads
from shardckpt.saving import async_save as background
from shardckpt.saving import shard_writer, staging
from shardckpt.state.flatten import flatten
from shardckpt.state.local_chunks import LocalChunk
from tests.stand_in_device import DEVICES, StandIn, raw, to_device

MIB = 1 << 20


def forget():
    """Drop the memory that is locked, while the stand-in can still release it."""
    if background._background is not None:
        background._background.finish()
        background._background.pool = staging.StagingPool()
    buffers._free_locked.clear()
    gc.collect()


@functools.cache
def values(number: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    bits = torch.randint(0, 255, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape).nan_to_num(1.0) if shape else torch.tensor(3.0)


def samples() -> dict[str, torch.Tensor]:
    """Tensors that take every way to a file: small, large, of several buffers, views, scalars."""
    return {
        "large": values(1, 2500, 1001),
        "small": values(2, 30),
        "scalar": values(3),
        "bytes": values(4, 7, dtype=torch.uint8),
        "half": values(5, 300, 1001, dtype=torch.float16),
        "tiny": values(6, 3),
        "wide": values(7, 2, 5 * MIB // 4),
        "empty": torch.empty(0, 4),
    }


def produced(machine: StandIn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of both devices, whose values are work that was only submitted.

    The work is that of a device, which does not count as a change by the program.
    """
    made = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        device = DEVICES[number % 2]
        memory = torch.zeros_like(tensor)
        made[name] = to_device(memory, device)
        machine.current_stream(device).submit(
            lambda memory=memory.data, tensor=tensor: memory.copy_(tensor)
        )
    return made


def image(tensors: Any) -> bytes:
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


class File:
    """A file in memory."""

    direct = True

    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(size_bytes + 4096)

    def write(self, view: memoryview, *, offset: int) -> None:
        self.data[offset : offset + len(view)] = view


def written(tensors: Any, expected: bytes, module: Any = shard_writer) -> bool:
    """Whether the bytes and digests of a shard are right."""
    file = File(len(expected))
    submitted = devices.submitted_work()
    size, digests = module.write_shard(file, header=b"", tensors=tensors, submitted=submitted)
    blocks = [expected[at : at + BLOCK_BYTES] for at in range(0, len(expected), BLOCK_BYTES)]
    return file.data[:size] == expected and digests.tolist() == [block_digest(b) for b in blocks]


def filled(
    folder: Path,
    expected: dict[str, torch.Tensor],
    targets: Any,
    read_all: Any = shard_reader.read_all,
    threads: int = 2,
) -> bool:
    """Whether a load fills tensors of devices, although their memory is still in use."""
    with shardckpt.open_checkpoint(folder) as checkpoint, shardckpt.options(read_threads=threads):
        manifest = checkpoint.manifest
        wanted = [
            (manifest.tensors[name], LocalChunk((0,) * t.dim(), tuple(t.shape), t))
            for name, t in targets.items()
        ]
        read_all(checkpoint.files, manifest, plan_reads(wanted))
    at_the_end = {name: raw(tensor).clone() for name, tensor in targets.items()}
    devices.accelerator.synchronize(DEVICES[0])  # nothing may come after the load
    return all(
        torch.equal(found, expected[name])
        for last in (at_the_end, {name: raw(tensor) for name, tensor in targets.items()})
        for name, found in last.items()
    )


def in_use(machine: StandIn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of both devices that earlier work still overwrites."""
    return produced(machine, {name: torch.full_like(t, 7) for name, t in tensors.items()})


def staged(machine: StandIn, module: Any = staging) -> bool:
    """Whether a staged plan holds the values of the call."""
    state = samples()
    mixed = {**produced(machine, state), "cpu": values(9, MIB)}
    plan = local_plan(flatten(mixed, rank=0), world_size=1)
    buffer = staging.StagingBuffer(staging.staged_bytes(plan), locked=True)
    found, marks = module.stage(plan, buffer, devices.submitted_work())
    for mark in marks.values():
        devices.wait_for(mark)
    names = [found.common[row].name for row in found.chunks.tensor.tolist()]
    expected = {**state, "cpu": mixed["cpu"]}
    return all(torch.equal(d, expected[n]) for n, d in zip(names, found.data, strict=True))
