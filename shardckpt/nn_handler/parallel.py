"""One script for one process and for many: process group, devices, wrapping, sums over ranks."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn

from shardckpt.config import current
from shardckpt.coordination.mpi.launch import several_ranks
from shardckpt.coordination.process_group import init_from_mpi
from shardckpt.coordination.shutdown import leave_at_exit
from shardckpt.errors import StateError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Layout",
    "Parallel",
    "clip_gradients",
    "largest",
    "mean_over_ranks",
    "start",
    "synchronise_gradients",
    "wrap",
]

Parallel = Literal["auto", "none", "ddp", "fsdp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a job is spread: `mode` as resolved, and this process's place among those that see
    different data (with tensor parallelism, several ranks see the same)."""

    mode: Parallel
    device: torch.device
    mesh: DeviceMesh | None = None
    tp_plan: Mapping[str, Any] | None = None

    @property
    def rank(self) -> int:
        """This process's rank."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def data(self) -> tuple[int, int]:
        """(place, number of places) in the division of the data."""
        if self.mode == "none" or not dist.is_initialized():
            return 0, 1
        if self.mesh is None:
            return dist.get_rank(), dist.get_world_size()
        if "dp" not in (self.mesh.mesh_dim_names or ()):
            return 0, 1
        return self.mesh["dp"].get_local_rank(), self.mesh["dp"].size()


def start(
    parallel: Parallel,
    device: str | torch.device | None,
    mesh: DeviceMesh | None = None,
    tp_plan: Mapping[str, Any] | None = None,
) -> Layout:
    """Join the process group of the launcher, if there is one.

    "auto" is "fsdp" with a device mesh; else "ddp" where torchrun, mpirun, srun (or another
    launcher that sets WORLD_SIZE) started several processes, else "none". A mesh has the
    dimension "dp", "tp" or both; `tp_plan` is that of torch's parallelize_module.
    """
    if str(parallel) not in get_args(Parallel):
        raise StateError(
            "Unknown value for parallel",
            expected='"auto", "none", "ddp" or "fsdp"',
            actual=repr(parallel),
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if parallel != "none" and not dist.is_initialized():
        _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # type: ignore[unreachable]
        torch.cuda.set_device(device)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    odd = not names or not set(names) <= {"dp", "tp"} or parallel in ("ddp", "none")
    if (mesh is not None and odd) or (tp_plan is not None and "tp" not in names):
        raise StateError(
            "This device mesh does not fit",
            expected='the dimensions "dp", "tp" or both, and parallel="fsdp"; "tp" for a tp_plan',
            actual=f"dimensions {names}, parallel={parallel!r}",
        )
    if not dist.is_initialized():
        return Layout(mode="none", device=device)
    mode: Parallel = parallel if parallel != "auto" else ("ddp" if mesh is None else "fsdp")
    return Layout(mode=mode, device=device, mesh=mesh, tp_plan=tp_plan)


def _join(backend: str) -> None:
    """The group of torchrun's ranks, or of those of mpirun or srun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timeout = datetime.timedelta(seconds=current().arrival_deadline_s)
        dist.init_process_group(backend, timeout=timeout)
        leave_at_exit()
    elif several_ranks():
        init_from_mpi(backend, timeout_s=current().arrival_deadline_s)


def wrap(model: nn.Module, layout: Layout) -> nn.Module:
    """The model on its device, the same on all ranks, under DDP, FSDP2 or tensor parallelism."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return model
    model = model.to(layout.device)
    if layout.mode == "ddp":
        trained = any(parameter.requires_grad for parameter in model.parameters())
        return nn.parallel.DistributedDataParallel(model) if trained else model
    if layout.mode == "fsdp":
        # fully_shard takes every rank's own values: they start from rank 0's
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)
        _shard(model, layout)
    return model


def _shard(model: nn.Module, layout: Layout) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    names = () if layout.mesh is None else layout.mesh.mesh_dim_names or ()
    if layout.mesh is not None and "tp" in names:
        parallelize_module(model, layout.mesh["tp"], dict(layout.tp_plan or {}))
    if layout.mesh is not None and "dp" not in names:
        return
    options: dict[str, Any] = {} if layout.mesh is None else {"mesh": layout.mesh["dp"]}
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for block in module:
                if any(p.requires_grad for p in block.parameters()):
                    fully_shard(block, **options)
    fully_shard(model, **options)


def synchronise_gradients(model: nn.Module, *, now: bool) -> None:
    """Whether the next backward adds gradients up over ranks, or leaves that to a later one."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def clip_gradients(model: nn.Module, norm: float) -> None:
    """Scale all gradients so that their norm, over all of them and all ranks, is at most `norm`."""
    by_mesh: dict[Any, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = getattr(parameter.grad, "device_mesh", None)
            by_mesh.setdefault(mesh, []).append(parameter)
    if not by_mesh:
        return
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        for group in by_mesh.values()
    ]
    whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    total = whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, norm, total)


def mean_over_ranks(sums: dict[str, float], count: int, device: torch.device) -> dict[str, float]:
    """Sums over this rank's samples as means over all ranks' samples; collective."""
    totals = torch.tensor([*sums.values(), count], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(totals)
    *means, total = totals.tolist()
    return {n: value / total if total else math.nan for n, value in zip(sums, means, strict=True)}


def largest(flags: list[int], device: torch.device) -> list[int]:
    """The largest of every rank's numbers, place by place; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flags
    here = torch.device("cpu") if "gloo" in str(dist.get_backend_config()) else device
    tensor = torch.tensor(flags, dtype=torch.int64, device=here)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    found: list[int] = tensor.tolist()
    return found
