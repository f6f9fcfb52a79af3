"""Write the folders torch_checkpointing-0.1.1/* beside this file, with torch_checkpointing itself
on CPU ranks:

pip install torch-checkpointing==0.1.1
for ranks in 1 2 4; do
    torchrun --standalone --nproc-per-node $ranks \\
        tests/convert/made_by/write_torch_checkpointing.py
done

`expected.pt` of each folder holds the state that rank 0 loads with torch_checkpointing itself, in
full tensors.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch_checkpointing import CheckpointManager, ItemSpec
from torch_checkpointing.checkpoint_layout import (
    JsonSerialization,
    LayoutInfo,
    RawSerialization,
    SafetensorsSerialization,
)
from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
from torch_checkpointing.default_resharder import DefaultResharder
from torch_checkpointing.metadata_manager import DefaultMetadataManager
from torch_checkpointing.state_transformations import optimizer_transform_pre
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

FOLDER = Path(__file__).parent / "torch_checkpointing-0.1.1"


@dataclass
class Settings:
    """A class that no reader has."""

    width: int = 3


class Model(nn.Module):
    """Uneven sizes, and a buffer."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(3, 7)
        self.down = nn.Linear(7, 3, bias=False)
        self.register_buffer("shift", torch.tensor([0.25, 0.5, -0.75]))


def gathered_metadata(self, data, process_group=None):
    """Gather metadata over gloo. torch_checkpointing gathers them on CUDA devices."""
    every = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(every, data, group=process_group)
    return dict(enumerate(every))


def trained(model):
    """Train a model for two steps."""
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()
    return optimizer


def state_of(model, optimizer, **more):
    return {
        "model": model.state_dict(),
        "optimizer": optimizer_transform_pre(optimizer.state_dict()),
        **more,
    }


def plain(rank):
    """Plain tensors, values of many types, and entries that differ by rank. No metadata.pkl."""
    model = Model()
    optimizer = trained(model)
    half = torch.arange(6.0).to(torch.bfloat16)
    return state_of(
        model,
        optimizer,
        step=7,
        rng=torch.arange(5, dtype=torch.uint8) + rank,
        data={"position": 10 + rank, "order": [3, (1, "x")], "tied": [half, half[::2]]},
        odd={"none": None, "flag": True, "lr": 0.5, 3: b"\0\1", "settings": Settings()},
    ), {}


def single(rank):
    """One rank, saved asynchronously, with metadata."""
    model = Model()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.5)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    return state, {"model": ItemSpec(resharder=DefaultResharder())}


def fsdp2(rank):
    """FSDP2 over uneven sizes, saved asynchronously, with metadata."""
    model = fully_shard(Model())
    state = state_of(model, trained(model), step=torch.tensor(2.5))
    specs = {name: ItemSpec(resharder=DefaultResharder()) for name in ("model", "optimizer")}
    return state, specs


def mixed(rank):
    """Safetensors, JSON and bytes in folders, with metadata."""
    model = fully_shard(Model())
    state = {"model": model.state_dict(), "settings": {"width": 3, "rank": rank}, "note": b"a note"}
    specs = {
        "model": ItemSpec(
            layout=LayoutInfo("rank_{rank}/model.safetensors", SafetensorsSerialization()),
            resharder=DefaultResharder(),
        ),
        "settings": ItemSpec(
            layout=LayoutInfo("rank_{rank}/settings.json", JsonSerialization(Settings))
        ),
        "note": ItemSpec(layout=LayoutInfo("rank_{rank}/note", RawSerialization())),
    }
    return state, specs


def mesh(rank):
    """FSDP2 over tensor parallelism on a 2-D mesh, with metadata: strided shards."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Model()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = fully_shard(parallelize_module(model, world["tp"], plan), mesh=world["dp"])
    specs = {name: ItemSpec(resharder=DefaultResharder()) for name in ("model", "optimizer")}
    return state_of(model, trained(model)), specs


def hsdp(rank):
    """HSDP, a tensor of two ranks alone, and partial sums, without metadata. Each rank has a layer
    of its own, as pipeline stages have."""
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(Model(), mesh=world)
    pair = DeviceMesh("cpu", [3, 1])
    full = torch.arange(15.0).reshape(5, 3)
    alone = distribute_tensor(full, pair, [Shard(1)], src_data_rank=None)
    sums = DTensor.from_local(torch.ones(2) * rank, world, [Partial(), Replicate()])
    layer = {f"layers.{rank}.weight": torch.full((2,), float(rank))}
    state = {"model": {**model.state_dict(), **layer}, "alone": alone, "sums": {"loss": sums}}
    return state, {}


FOLDERS = {"single": 1, "plain": 2, "fsdp2": 2, "mixed": 2, "mesh": 4, "hsdp": 4}
ASYNCHRONOUS = {"single", "fsdp2"}
NOT_LISTED = {"mixed": {"settings": None, "note": None}}


def full(node):
    """Return a state with full tensors on all ranks."""
    if isinstance(node, DTensor):
        return node.full_tensor().clone()
    if isinstance(node, torch.Tensor):
        return node.clone()
    if isinstance(node, dict):
        return {key: full(item) for key, item in node.items()}
    return type(node)(map(full, node)) if isinstance(node, (list, tuple)) else node


def emptied(node):
    """Return a state of the same layout, with zeros in place of tensors."""
    if isinstance(node, torch.Tensor):
        return torch.zeros_like(node)
    if isinstance(node, dict):
        return {key: emptied(item) for key, item in node.items()}
    return type(node)(map(emptied, node)) if isinstance(node, (list, tuple)) else node


def write(name):
    rank, folder = dist.get_rank(), FOLDER / name
    torch.manual_seed(0)
    state, specs = globals()[name](rank)
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    saver = AsyncCheckpointSaverConfig() if name in ASYNCHRONOUS else SyncCheckpointSaverConfig()
    manager = CheckpointManager.Config(
        items=specs,
        save=saver,
        storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
    ).build()
    done = manager.save(str(folder), state)
    if done is not None:
        done.result()
    dist.barrier()
    with torch.no_grad():
        loaded = manager.load(str(folder), into={**emptied(state), **NOT_LISTED.get(name, {})})
    loaded = {key: loaded[key] for key in loaded if key not in ("sums", "odd", "settings")}
    alone = loaded.pop("alone", None)
    expected = full(loaded)
    if alone is not None:  # a tensor of ranks 3 and 1
        expected["alone"] = torch.arange(15.0).reshape(5, 3)
    if rank == 0:
        torch.save(expected, folder / "expected.pt")
    manager.close()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    DefaultMetadataManager._all_gather_pickled_data = gathered_metadata
    for name, ranks in FOLDERS.items():
        if ranks == dist.get_world_size():
            write(name)
    dist.destroy_process_group()
