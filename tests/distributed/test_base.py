"""Saves with a base on several ranks."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardckpt
from tests.ranks import on_world_sizes, run_ranks

pytestmark = pytest.mark.ranks

SIZE = 1536  # a frozen layer of 9 MiB: more than 4 MiB on each of two ranks


def a_job(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(SIZE, SIZE).requires_grad_(False), nn.Linear(SIZE, 3)
    )
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.1)


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, SIZE)).sum().backward()
    optimizer.step()


def tensors(value: object) -> list[torch.Tensor]:
    """The local parts of all tensors."""
    if isinstance(value, torch.Tensor):
        return [value.to_local() if isinstance(value, DTensor) else value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for item in items for tensor in tensors(item)]


def saves(world_size: int, folder: str, kind: str, base: str | None) -> None:
    """Two saves, the second with the first as base; the first has `base`, of other ranks."""
    model, optimizer = a_job(kind)
    state = {"model": model, "optimizer": optimizer}
    path = f"{folder}/{kind}-{world_size}"
    first = shardckpt.save(state, f"{path}-0", base=base and f"{folder}/{kind}-{base}")
    assert first.linked_by_rank == (0,) * world_size  # nothing matches, and nothing is wrong
    assert first.base_problems == ()
    a_step(model, optimizer)  # makes the optimizer's state: the frozen files stay as they are
    second = shardckpt.save(state, f"{path}-1", base=f"{path}-0")
    least = 4 * SIZE * SIZE // world_size - (64 << 10)
    assert all(linked > least for linked in second.linked_by_rank), second.linked_by_rank
    assert second.written_bytes < second.total_bytes / 5
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(f"{path}-0")
    dist.barrier()
    other, fresh = a_job(kind)
    a_step(other, fresh)
    shardckpt.load({"model": other, "optimizer": fresh}, f"{path}-1")
    for mine, theirs in ((model, other), (optimizer, fresh)):
        pairs = zip(tensors(mine.state_dict()), tensors(theirs.state_dict()), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def growing(world_size: int, folder: str) -> None:
    saves(world_size, folder, "fsdp", {2: None, 1: "2-1"}[world_size])


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_each_rank_links_its_own(tmp_path, kind):
    run_ranks(2, saves_of_two, str(tmp_path), kind, timeout_s=120)
    whole = shardckpt.load_state(tmp_path / f"{kind}-2-1")
    assert whole["model"]["0.weight"].shape == (SIZE, SIZE)
    frozen = [name for name in os.listdir(tmp_path / f"{kind}-2-1") if "-frozen" in name]
    assert len(frozen) == 2


def saves_of_two(folder: str, kind: str) -> None:
    saves(2, folder, kind, None)


def test_a_base_of_another_world_size_matches_nothing(tmp_path):
    run_ranks(2, on_world_sizes, (2, 1), growing, str(tmp_path), timeout_s=120)


def differing(folder: str) -> tuple[int, ...]:
    """One rank sees no base: it writes, the other one links."""
    state = {"model": a_job("ddp")[0]}
    shardckpt.save(state, f"{folder}/0")
    base = f"{folder}/0" if dist.get_rank() else f"{folder}/nothing"
    report = shardckpt.save(state, f"{folder}/1", base=base)
    assert len(report.base_problems) == 1
    assert report.base_problems[0].startswith("rank 0: The checkpoint does not exist")
    return report.linked_by_rank


def test_every_rank_decides_for_itself(tmp_path):
    (mine, others), same = run_ranks(2, differing, str(tmp_path), timeout_s=120)
    assert mine == 0 < others
    assert same == (mine, others)
    with shardckpt.open_checkpoint(tmp_path / "1") as checkpoint:
        checkpoint.verify()
