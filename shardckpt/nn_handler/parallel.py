"""One script for one process and for many: devices, wrapping, and which samples a rank sees."""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from shardckpt.errors import StateError

__all__ = ["Parallel", "mean_over_ranks", "start", "train_loader", "val_loader", "wrap"]

Parallel = Literal["auto", "none", "ddp", "fsdp"]


def start(parallel: Parallel, device: str | torch.device) -> tuple[Parallel, torch.device]:
    """Join the process group of the launcher, if there is one; the resolved mode and device.

    "auto" is "ddp" where torchrun (or another launcher that sets WORLD_SIZE) started several
    processes, else "none".
    """
    if str(parallel) not in get_args(Parallel):
        raise StateError(
            "Unknown value for parallel",
            expected='"auto", "none", "ddp" or "fsdp"',
            actual=repr(parallel),
        )
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # type: ignore[unreachable]
        torch.cuda.set_device(device)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and parallel != "none" and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    if not dist.is_initialized():
        return "none", device
    return ("ddp" if parallel == "auto" else parallel), device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # gloo's threads drop their last tensors after the collective that the main thread has waited
    # for, and need the interpreter lock for it; one that still waits for the lock when the
    # interpreter ends aborts the process (torch 2.13). So the lock is left to them for a moment.
    time.sleep(0.1)


def world() -> tuple[int, int]:
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(model: nn.Module, parallel: Parallel, device: torch.device) -> nn.Module:
    """The model on its device, the same on all ranks, under DDP or FSDP2."""
    model = model.to(device)
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard

        # fully_shard takes every rank's own values: they start from rank 0's
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)
        for module in model.modules():
            if isinstance(module, (nn.ModuleList, nn.Sequential)):
                for block in module:
                    if any(p.requires_grad for p in block.parameters()):
                        fully_shard(block)
        fully_shard(model)
    return model


def train_loader(
    data: Dataset[Any] | DataLoader[Any], options: dict[str, Any], *, seed: int
) -> DataLoader[Any]:
    """A loader whose order follows from seed and epoch alone, each rank seeing its own part."""
    dataset, options = _take_apart(data, options)
    if not hasattr(dataset, "__getitem__") or "sampler" in options or "batch_sampler" in options:
        return DataLoader(dataset, **options)
    rank, size = world()
    shuffle = options.pop("shuffle", False)
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, num_replicas=size, rank=rank, shuffle=bool(shuffle), seed=seed
    )
    return DataLoader(dataset, sampler=sampler, **options)


def _take_apart(
    data: Dataset[Any] | DataLoader[Any], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    if not isinstance(data, DataLoader):
        return data, dict(options)
    if options:
        raise StateError(
            "A DataLoader was given together with options for one",
            actual=", ".join(options),
            remedy="give a Dataset with options, or a DataLoader without",
        )
    shuffle = isinstance(data.sampler, torch.utils.data.RandomSampler)
    own = isinstance(
        data.sampler, (torch.utils.data.RandomSampler, torch.utils.data.SequentialSampler)
    )
    options = {
        name: getattr(data, name)
        for name in ("batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last")
    }
    return data.dataset, options | ({"shuffle": shuffle} if own else {"sampler": data.sampler})


class _EveryNth:
    """Batches of the samples rank, rank + world size, ...: each sample once over all ranks.

    Ranks that have a batch less than others get one more, of sample 0, which is not counted:
    a sharded model's forward needs every rank.
    """

    def __init__(self, length: int, batch_size: int) -> None:
        rank, size = world()
        own = range(rank, length, size)
        self.batches = [list(own[at : at + batch_size]) for at in range(0, len(own), batch_size)]
        self.counted = len(self.batches)
        most = math.ceil(math.ceil(length / size) / batch_size)
        self.batches += [[0]] * (most - self.counted)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def val_loader(
    data: Dataset[Any] | DataLoader[Any], options: dict[str, Any]
) -> tuple[DataLoader[Any], int]:
    """A loader that shows every sample to exactly one rank, and how many batches count."""
    dataset, options = _take_apart(data, options)
    batch_size = options.pop("batch_size", 1)
    options.pop("shuffle", None)
    options.pop("drop_last", None)
    if options.pop("sampler", None) is not None or not hasattr(dataset, "__getitem__"):
        raise StateError(
            "A validation set needs a length and an order",
            expected="a Dataset with __getitem__ and __len__",
            actual=type(dataset).__name__,
            remedy="give the Dataset itself",
        )
    batches = _EveryNth(len(dataset), batch_size)
    return DataLoader(dataset, batch_sampler=batches, **options), batches.counted


def mean_over_ranks(sums: dict[str, float], count: int, device: torch.device) -> dict[str, float]:
    """Sums over this rank's samples as means over all ranks' samples; collective."""
    totals = torch.tensor([*sums.values(), count], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(totals)
    *means, total = totals.tolist()
    return {name: value / max(total, 1) for name, value in zip(sums, means, strict=True)}
