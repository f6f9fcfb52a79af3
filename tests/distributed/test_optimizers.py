"""Optimizers whose state is spread over ranks in their own ways."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardckpt
from tests.distributed.jobs import full
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


def a_model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))


def sharded(seed):
    return fully_shard(a_model(seed), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def ddp(seed):
    return nn.parallel.DistributedDataParallel(a_model(seed))


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 6)).square().sum().backward()
    optimizer.step()


class Pair(optim.Optimizer):
    """A list of two tensors for each parameter, as optimizers with preconditioners have."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                pair = self.state[p].setdefault("pair", [torch.zeros_like(p) for _ in range(2)])
                pair[0].add_(p.grad)
                pair[1].add_(pair[0])
                p.sub_(pair[1], alpha=group["lr"])


class Factored(optim.Optimizer):
    """State of rows, as DTensors of another shape than the parameter. (torch's own Adafactor can't
    step over parameters that are sharded on several ranks.)"""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                rows = p.grad.square().mean(dim=-1, keepdim=True)
                own = self.state[p].setdefault("rows", torch.zeros_like(rows))
                own.lerp_(rows, 0.5)
                p.sub_(p.grad / (own.sqrt() + 1e-3), alpha=group["lr"])


class Wrapped(optim.Optimizer):
    """Wraps AdamW; its state_dict has a form of its own."""

    def __init__(self, parameters):
        self.base = optim.AdamW(parameters)
        super().__init__(self.base.param_groups, {})

    def step(self, closure=None):
        self.base.step()

    def state_dict(self):
        return {"base": self.base.state_dict(), "k": 5}

    def load_state_dict(self, state):
        self.base.load_state_dict(state["base"])


def zero(parameters):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch's own code

    return ZeroRedundancyOptimizer(parameters, optim.AdamW, lr=0.1)


def local(parameters):
    from torch.distributed.optim import PostLocalSGDOptimizer

    averager = PeriodicModelAverager(period=4, warmup_steps=2)
    return PostLocalSGDOptimizer(optim.SGD(parameters, lr=0.1, momentum=0.9), averager)


JOBS = {
    "lists": (sharded, Pair),
    "wrapped": (sharded, Wrapped),
    "zero": (ddp, zero),
    "local": (ddp, local),
    "factored": (sharded, Factored),
}


def save(name, path):
    model, make = JOBS[name]
    module = model(0)
    optimizer = make(module.parameters())
    for _ in range(2):
        step(module, optimizer)
    shardckpt.save({"m": module, "o": optimizer}, path / "c")
    shardckpt.async_save({"m": module, "o": optimizer}, path / "async").result()
    step(module, optimizer)
    return full(next(module.parameters()).detach()).tolist()


def load(name, path):
    model, make = JOBS[name]
    found = []
    for saved in ("c", "async"):
        module = model(1)
        optimizer = make(module.parameters())
        shardckpt.load({"m": module, "o": optimizer}, path / saved)
        step(module, optimizer)
        found.append(full(next(module.parameters()).detach()).tolist())
    return found


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 3])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("lists", "zero") else pytest.mark.long)
        for name in JOBS
    ],
)
def test_goes_on_on_another_number_of_ranks(tmp_path, name, world_size):
    weight = run_ranks(2, save, name, tmp_path)[0]
    for found in run_ranks(world_size, load, name, tmp_path):
        for other in found:
            assert torch.allclose(torch.tensor(weight), torch.tensor(other), atol=1e-6)


def test_zero_redundancy_state_loads_into_the_plain_optimizer(tmp_path):
    weight = run_ranks(2, save, "zero", tmp_path)[0]
    module = a_model(1)
    optimizer = optim.AdamW(module.parameters(), lr=0.1)
    shardckpt.load({"m": module, "o": optimizer}, tmp_path / "c")
    step(module, optimizer)
    assert torch.allclose(torch.tensor(weight), next(module.parameters()), atol=1e-6)
