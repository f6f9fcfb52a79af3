"""All that is private in torch, or differs between its versions, stands in torch_compat."""

from __future__ import annotations

import ast
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, SequentialLR

import shardckpt
from shardckpt import torch_compat
from shardckpt.integrations.dcp import ShardWriter
from tests.ranks import FSDP2_ON_CPU, run_ranks

PACKAGE = Path(shardckpt.__file__).parent
FILES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "torch_compat.py"})


def _is_private(name: str) -> bool:
    return any(re.match(r"_[^_]", part) for part in name.split("."))


def private_names(source: str) -> set[str]:
    """The private attributes that a module uses, except its own and those of accelerate, and its
    private imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in (
            "self",
            "cls",
            "accelerator",
        ):
            chain = ast.unparse(node)
            found.add(chain if chain.startswith("torch.") else node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found |= {f"{node.module}.{item.name}" for item in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            found |= {str(item.value) for item in node.args if isinstance(item, ast.Constant)}
    return {name for name in found if _is_private(name)}


IN_COMPAT = private_names((PACKAGE / "torch_compat.py").read_text())


def used_elsewhere(source: str) -> set[str]:
    """The private names of torch in a module that is not torch_compat."""
    names = private_names(source)
    return (names & IN_COMPAT) | {name for name in names if name.startswith("torch.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_uses_private_names_of_torch(path):
    assert used_elsewhere(path.read_text()) == set()


@pytest.mark.parametrize(
    "line",
    [
        "tensor._local_tensor",
        "tensor.untyped_storage()._cdata",
        "torch._foreach_copy_(a, b)",
        "torch._C._nothing()",
        "from torch.utils._pytree import tree_map",
        "from torch.distributed.checkpoint.filesystem import _StorageInfo",
        'getattr(planner, "_enable_plan_caching", False)',
    ],
)
def test_a_private_name_would_be_seen(line):
    assert used_elsewhere(line)
    assert not used_elsewhere("self._files._names; value.__dict__; 'torch._utils._rebuild_tensor'")


def test_dtypes_are_found_by_name():
    assert torch_compat.find_dtype("bfloat16") is torch.bfloat16
    assert torch_compat.find_dtype("float1024") is None
    assert torch_compat.find_dtype("nn") is None


def test_change_counts_grow_and_storages_differ():
    tensor, empty = torch.ones(3), torch.ones(0)
    before = torch_compat.change_count(tensor)
    tensor.add_(1)
    assert torch_compat.change_count(tensor) > before
    assert torch_compat.storage_id(tensor) == torch_compat.storage_id(tensor[1:])
    assert torch_compat.storage_id(empty) != torch_compat.storage_id(torch.ones(0))


def test_parameters_are_distinguished_from_tensors():
    assert torch_compat.is_parameter(nn.Parameter(torch.ones(1)))
    assert not torch_compat.is_parameter(torch.ones(1))


def test_the_functions_that_load_a_module():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert torch_compat.child_names(module) == ["0", "1"]
    assert len(torch_compat.load_functions(module)) == 1
    module.register_load_state_dict_pre_hook(lambda *arguments: None)
    module.register_load_state_dict_post_hook(lambda *arguments: None)
    assert len(torch_compat.load_functions(module)) == 3


def test_versions_of_modules_are_carried():
    source, target = nn.BatchNorm1d(2).state_dict(), nn.Linear(2, 2).state_dict()
    torch_compat.carry_versions(source, target)
    assert target._metadata == source._metadata
    torch_compat.carry_versions({}, target)
    assert target._metadata == source._metadata


def test_parts_of_schedulers():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    parts = [ConstantLR(optimizer), ExponentialLR(optimizer, 0.9)]
    whole = SequentialLR(optimizer, parts, milestones=[2])
    assert list(torch_compat.inner_schedulers(whole)) == parts
    assert list(torch_compat.inner_schedulers(parts[0])) == []


def test_buffers_are_left_alone_by_an_option_of_this_version():
    run_ranks(2, _buffers)


def _buffers():
    model = nn.BatchNorm1d(2)
    wrapped = nn.parallel.DistributedDataParallel(model, **torch_compat.unsynchronized_buffers())
    wrapped.eval()
    with torch.no_grad():
        model.running_mean.fill_(dist.get_rank())
        wrapped(torch.ones(3, 2))
    assert model.running_mean.tolist() == [dist.get_rank()] * 2


@pytest.mark.parametrize("whole_only", [True, False])
def test_the_parts_of_a_tensor_are_those_of_distribute_tensor(whole_only):
    run_ranks(4, _distributed, whole_only)


def _distributed(whole_only):
    torchs = distribute_tensor
    if whole_only:  # torch before 2.7

        def without_option(tensor, mesh, placements):
            return torchs(tensor, mesh, placements)

        torch.distributed.tensor.distribute_tensor = without_option
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(35.0).reshape(7, 5)
    for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Shard(0)]):
        here = torch_compat.distribute_locally(whole, mesh, placements)
        expected = torchs(whole, mesh, placements)
        assert here.placements == expected.placements
        assert here.shape == whole.shape
        assert torch.equal(here.to_local(), expected.to_local())
        again = torch_compat.dtensor(here.to_local().clone(), torch_compat.spec_of(here))
        assert type(again) is DTensor
        assert torch.equal(again.full_tensor(), whole)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for rows in (16, 6, 5) if FSDP2_ON_CPU else (16,):  # PyTorch 2.6 divides no other rows
        strided = fully_shard_over_tensor_parallel(mesh, rows)
        spec = torch_compat.spec_of(strided)
        whole = torch.arange(rows * 5.0).reshape(rows, 5)
        here = torch_compat.distribute_locally(whole, strided.device_mesh, spec.placements)
        assert any(hasattr(placement, "split_factor") for placement in spec.placements)
        data, tensor = strided.device_mesh.get_coordinate()
        assert torch.equal(here.to_local(), whole.chunk(2)[tensor].chunk(2)[data])
        assert here.to_local().shape == strided.to_local().shape


def fully_shard_over_tensor_parallel(mesh, rows):
    model = parallelize_module(nn.Linear(5, rows), mesh["b"], ColwiseParallel())
    return fully_shard(model, mesh=mesh["a"]).weight


@pytest.mark.parametrize("can_clone", [True, False])
def test_clones_of_the_store_of_a_group_see_each_others_keys(can_clone):
    run_ranks(2, _store, can_clone)


def _store(can_clone):
    def clone(group):
        store = torch_compat.group_store(group)
        return torch_compat.clone_store(store if can_clone else Uncloneable(store))

    mine, other = (f"from {rank}" for rank in (dist.get_rank(), 1 - dist.get_rank()))
    clone(dist.group.WORLD).set(mine, "here")
    again = clone(dist.group.WORLD)
    assert again.get(other) == b"here"
    assert not clone(dist.new_group([0, 1])).check([mine])
    with pytest.raises(RuntimeError):
        again.wait(["never"], datetime.timedelta(milliseconds=50))


class Uncloneable(dist.PrefixStore):
    """A store of torch before 2.8."""

    def __init__(self, store):
        super().__init__("", store)

    @property
    def clone(self):
        raise AttributeError


def test_dcp_saves_with_and_without_the_ranks_of_the_group(tmp_path):
    run_ranks(2, _dcp_save, str(tmp_path))


def _dcp_save(folder):
    planner = DefaultSavePlanner()
    assert not torch_compat.caches_plans(planner)
    names = f"{folder}/own-{dist.get_rank()}", f"{folder}/both"
    for name, alone in zip(names, (True, False), strict=True):
        torch_compat.dcp_save(
            {"w": torch.ones(3)},
            ShardWriter(name),
            planner=planner,
            process_group=None,
            alone=alone,
        )
        with shardckpt.alone():
            assert shardckpt.metadata(name).world_size == (1 if alone else 2)


USES = """
import sys, torch, shardckpt
state = {"model": torch.nn.Linear(3, 4), "x": torch.ones(3)}
shardckpt.save(state, "a")
shardckpt.load(state, "a")
shardckpt.load_state("a", device_map="cpu")
shardckpt.verify("a")
shardckpt.async_save(state, "b").result()
with shardckpt.open_checkpoint("a") as checkpoint:
    checkpoint["x"][0:2]
slow = ("torch.distributed.tensor", "torch._dynamo", "sympy")
print(*(name for name in slow if name in sys.modules))
"""


def test_a_process_without_dtensors_does_not_import_them(tmp_path):
    """The import takes half as long as that of torch."""
    run = subprocess.run(
        [sys.executable, "-c", USES],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_a_dtensor_is_found_once_its_module_is_imported(monkeypatch):
    monkeypatch.setattr(torch_compat, "_dtensor_class", None)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torch.distributed.tensor", None)
        assert torch_compat.dtensor_class() is None
        assert not torch_compat.is_dtensor(torch.ones(3))
    assert torch_compat.dtensor_class() is DTensor
