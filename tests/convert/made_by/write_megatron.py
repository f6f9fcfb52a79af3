"""Write the folder megatron-core-VERSION beside this file, with Megatron-Core itself on four CPU
ranks:

pip install megatron-core==0.16.1
python tests/convert/made_by/write_megatron.py

Two ranks of tensor parallelism hold the columns of a weight.
"""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core.dist_checkpointing import ShardedTensor, save
from megatron.core.dist_checkpointing.mapping import ShardedObject

np.product = np.prod  # version 0.12 calls it, and numpy 2 lacks it
torch.cuda.synchronize = lambda: None  # Megatron-Core calls these without asking for a GPU
torch.cuda.current_device = lambda: "cpu"
VERSION = version("megatron-core")
FOLDER = Path(__file__).parent / f"megatron-core-{VERSION}"
LAYERS = 3


def weight(layer: int) -> torch.Tensor:
    return torch.arange(24.0).reshape(4, 6) + 100 * layer


def rank_main(rank: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29412")
    dist.init_process_group("gloo", rank=rank, world_size=4)
    column, replica = rank % 2, rank // 2
    state = {"iteration": 7, "args": {"hidden": 4}, "layers": {}}
    for layer in range(LAYERS):
        part = weight(layer)[:, column * 3 : column * 3 + 3].contiguous()
        offsets = ((0, layer, LAYERS), (2, column, 2))
        state["layers"][f"weight{layer}"] = ShardedTensor.from_rank_offsets(
            "layers.weight", part, *offsets, prepend_axis_num=1, replica_id=replica
        )
        moments = part.flatten() + 0.5
        key = "optimizer.state.exp_avg.layers.weight"
        if VERSION.startswith("0.12"):
            half = slice(0, 5) if replica == 0 else slice(5, 12)
            state["layers"][f"moments{layer}"] = ShardedTensor.from_rank_offsets_flat(
                key, moments[half], part.shape, *offsets, prepend_axis_num=1, flattened_range=half
            )
        else:
            state["layers"][f"moments{layer}"] = ShardedTensor.from_rank_offsets(
                key, moments.reshape(4, 3), *offsets, prepend_axis_num=1, replica_id=replica
            )
    state["bias"] = ShardedTensor.from_rank_offsets(
        "bias", torch.arange(5.0), replica_id=(0, column, replica)
    )
    state["rng"] = ShardedObject("rng_state", {"seed": rank}, (4,), (rank,))
    if rank == 0:
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir()
    dist.barrier()
    save(state, str(FOLDER))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(rank_main, nprocs=4, start_method="fork")
