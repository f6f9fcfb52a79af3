"""Random tensors in random layouts: saved on one mesh, loaded on another, bit for bit."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import shardckpt
from tests.ranks import on_world_sizes, run_ranks

pytestmark = pytest.mark.ranks

TENSORS = 40
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]


def tensors() -> dict[str, torch.Tensor]:
    """The same on every rank: none to four dimensions, sizes that no mesh divides, or none."""
    chance = random.Random(5)
    torch.manual_seed(5)
    found = {}
    for number in range(TENSORS):
        shape = [chance.choice([0, 1, 2, 3, 5, 7, 12]) for _ in range(chance.randrange(5))]
        whole = torch.randint(0, 200, shape).to(chance.choice(DTYPES))
        found[f"t{number}"] = whole
    return found


def layouts(world_size: int, seed: int) -> dict[str, tuple]:
    """A mesh shape and placements for each tensor; None for a plain tensor."""
    chance = random.Random(seed)
    shapes = [(world_size,), (1, world_size), (2, world_size // 2), (world_size // 2, 2)]
    shapes = [s for s in shapes if 0 not in s and s[0] * (s[1] if len(s) > 1 else 1) == world_size]
    found = {}
    for name, whole in tensors().items():
        if chance.random() < 0.15:
            found[name] = None
            continue
        shape = chance.choice(shapes)
        choices = [Replicate(), *(Shard(dim) for dim in range(whole.dim()))]
        placements = [chance.choice(choices) for _ in shape]
        if len(shape) == 2 and whole.dim() and chance.random() < 0.3:
            dim = chance.randrange(whole.dim())  # as FSDP2 over tensor parallel has it
            placements = [_StridedShard(dim, split_factor=shape[1]), Shard(dim)]
        found[name] = (shape, placements)
    return found


def build(
    world_size: int, seed: int, meshes: dict[tuple[int, ...], DeviceMesh], *, blank: bool
) -> dict[str, torch.Tensor]:
    """The tensors in the layouts of a seed. `meshes` are used again: making one takes long."""
    state = {}
    for (name, whole), layout in zip(
        tensors().items(), layouts(world_size, seed).values(), strict=True
    ):
        whole = torch.zeros_like(whole) if blank else whole
        if layout is None:
            state[name] = whole
            continue
        shape, placements = layout
        if shape not in meshes:
            meshes[shape] = init_device_mesh("cpu", shape)
        state[name] = distribute_tensor(whole, meshes[shape], placements, src_data_rank=None)
    return state


def save_and_load(world_size: int, folder: str) -> None:
    meshes: dict[tuple[int, ...], DeviceMesh] = {}
    for seed in (1, 2):
        if world_size == 4:
            saved = build(4, seed, meshes, blank=False)
            shardckpt.save(saved, f"{folder}/{seed}", check_replicas=True)
        target = build(world_size, seed + 10 * world_size, meshes, blank=True)
        expected = build(world_size, seed + 10 * world_size, meshes, blank=False)
        shardckpt.load(target, f"{folder}/{seed}")
        for name, tensor in expected.items():
            mine, theirs = target[name], tensor
            if hasattr(tensor, "to_local"):
                mine, theirs = mine.to_local(), theirs.to_local()
            assert torch.equal(mine, theirs), (name, tensor, dist.get_rank())


def test_any_layout_to_any_other(tmp_path):
    run_ranks(4, on_world_sizes, (4, 3, 2, 1), save_and_load, str(tmp_path), timeout_s=110)
    for seed in (1, 2):
        state = shardckpt.load_state(tmp_path / str(seed))
        for name, whole in tensors().items():
            assert torch.equal(state[name], whole), name


def test_the_layouts_are_of_many_kinds():
    placements = [
        placement
        for world_size, seed in itertools.product((2, 4), range(4))
        for layout in layouts(world_size, seed).values()
        for placement in (layout[1] if layout else ())
    ]
    assert sum(placement.is_replicate() for placement in placements) > 50
    assert sum(hasattr(placement, "split_factor") for placement in placements) > 20
    assert {placement.dim for placement in placements if placement.is_shard()} >= {0, 1, 2, 3}
