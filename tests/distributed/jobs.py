"""Small training jobs in every layout, with the same values whatever the layout."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

KINDS = ("fsdp", "tp", "fsdp_tp", "hybrid", "ddp", "plain")


def model(seed: int) -> nn.Sequential:
    """Sizes that FSDP2 cuts unevenly; tensor parallel needs a hidden size that it divides."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5), nn.LayerNorm(5))


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model in a layout, and AdamW. Layouts of two dimensions fall back where ranks are odd."""
    size = dist.get_world_size()
    whole: nn.Module = model(seed)
    if kind == "fsdp" or (kind in ("fsdp_tp", "hybrid") and size % 2):
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(whole[0], mesh=mesh)
        fully_shard(whole, mesh=mesh)
    elif kind == "tp":
        mesh = init_device_mesh("cpu", (size,))
        parallelize_module(whole, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif kind == "fsdp_tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(whole, mesh["tensor"], plan)
        fully_shard(whole, mesh=mesh["data"])
    elif kind == "hybrid":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(whole, mesh=mesh)
    elif kind == "ddp":
        whole = nn.parallel.DistributedDataParallel(whole)
    return whole, torch.optim.AdamW(whole.parameters(), lr=0.01)


def step(whole: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step, on the same data on every rank."""
    optimizer.zero_grad()
    whole(torch.linspace(-1, 1, 28).reshape(4, 7)).square().sum().backward()
    optimizer.step()


def full(value: object) -> object:
    """The same with whole tensors; collective."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: full(item) for key, item in value.items()}
    return value


def everything(whole: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of model and optimizer, whole, by name."""
    inner = whole.module if isinstance(whole, nn.parallel.DistributedDataParallel) else whole
    names = [name for name, _ in inner.named_parameters()]
    found = {name: full(tensor).clone() for name, tensor in inner.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            found[f"{names[index]}/{key}"] = full(value).clone()
    return found
