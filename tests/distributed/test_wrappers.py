"""Modules under every wrapper, also with tied weights, are saved and loaded, and train on."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import shardckpt
from tests.distributed.jobs import full
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


class Tied(nn.Module):
    """Two layers that share their weight, and one whose buffers change in each forward."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.norm = norm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.inner(self.table(tokens)))))


def shard(module, **options):
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)
    return module


def with_inner(module, wrap):
    module.inner = wrap(module.inner)
    return module


BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WRAPPERS = {
    "sharded": shard,
    "in parts": lambda m: shard(with_inner(m, shard)),
    "kept whole after forward": lambda m: shard(m, reshard_after_forward=False),
    "mixed precision": lambda m: shard(m, mp_policy=BFLOAT16),
    "offloaded": lambda m: shard(m, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "recomputed": lambda m: shard(with_inner(m, lambda part: shard(checkpoint_wrapper(part)))),
    "compiled": lambda m: torch.compile(shard(m), backend="eager"),
    "compiled inside": lambda m: shard(
        with_inner(m, lambda part: torch.compile(part, backend="eager"))
    ),
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp of compiled": lambda m: nn.parallel.DistributedDataParallel(
        torch.compile(m, backend="eager")
    ),
}


def build(name, seed):
    torch.manual_seed(seed)
    # Under DDP batch norms drift apart, and rank 0's count; under FSDP2 they must not differ.
    model = WRAPPERS[name](Tied(nn.BatchNorm1d if name.startswith("ddp") else nn.LayerNorm))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model, optimizer):
    optimizer.zero_grad()
    model((torch.arange(8) + dist.get_rank()) % 11).float().square().sum().backward()
    optimizer.step()


def everything(model, optimizer):
    found = {key: full(value).clone() for key, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}/{key}": full(value).clone() for key, value in state.items()}
    return found


def check(name, folder):
    warnings.simplefilter("ignore")
    model, optimizer = build(name, 0)
    step(model, optimizer)
    model.eval()
    with torch.no_grad():
        model(torch.arange(8))  # FSDP2 may leave parameters gathered after this
    model.train()
    path = f"{folder}/{name}"
    shardckpt.save({"m": model, "o": optimizer}, path)
    expected = everything(model, optimizer)
    other, fresh = build(name, 1)
    step(other, fresh)
    shardckpt.load({"m": other, "o": fresh}, path)
    same(expected, everything(other, fresh))
    step(model, optimizer)
    step(other, fresh)
    same(everything(model, optimizer), everything(other, fresh))
    plain = Tied(nn.BatchNorm1d if name.startswith("ddp") else nn.LayerNorm)
    shardckpt.load({"m": plain, "o": torch.optim.AdamW(plain.parameters())}, path)


def same(mine, theirs):
    assert mine.keys() == theirs.keys()
    differing = [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])]
    # The means of batch norms on other ranks than DDP's rank 0 are neither saved nor used.
    assert not [n for n in differing if "running" not in n or dist.get_rank() == 0]


def check_all(names, folder):
    for name in names:
        check(name, folder)


@pytest.mark.parametrize("ddp", [False, True], ids=["fsdp", "ddp"])
def test_modules_under_every_wrapper_are_saved_and_loaded(tmp_path, ddp):
    names = [name for name in WRAPPERS if name.startswith("ddp") == ddp]
    run_ranks(2, check_all, names, str(tmp_path), timeout_s=110)
    for name in names:
        state = shardckpt.load_state(tmp_path / name)["m"]
        assert state["table.weight"] is state["head.weight"]
        assert set(state) == set(Tied(nn.BatchNorm1d if ddp else nn.LayerNorm).state_dict())
