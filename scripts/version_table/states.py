"""The checkpoint that each version writes, and each version reads:
`torchrun ... states.py write|read FOLDER`.

It has each dtype, modules and optimizers under FSDP2, a strided shard, arrays and values. All
numbers follow from their positions, so a reader knows them without random numbers.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardckpt
from shardckpt.coordination.shutdown import destroy_groups
from shardckpt.errors import CheckpointError
from shardckpt.format.dtypes import DTYPES

NEWER = {"F8_E8M0", "F4X2"}
"""The dtypes that early versions of torch lack. Each has a checkpoint of its own."""


def of_dtype(dtype):
    raw = torch.arange(24 * dtype.itemsize, dtype=torch.uint8)
    return (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)


def training(*, filled):
    """Return a model under FSDP2 after a step of AdamW, or the same without its numbers."""
    model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 3))
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            values = torch.arange(tensor.numel()).reshape(tensor.shape) / 64 + number
            tensor.copy_(values * filled)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    if filled:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def values():
    return {
        "text": "é",
        "tuple": (1, 2.5, None, True),
        "bytes": b"\0\xff",
        "dtype": torch.bfloat16,
        7: "an int key",
        "array": np.arange(12, dtype=np.int16).reshape(3, 4),
        "scalar": np.float32(0.25),
        "size": torch.Size([2, 3]),
    }


def sharded(*, filled):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(35.0).reshape(7, 5) * filled
    placements = {"rows": Shard(0), "columns": Shard(1), "replica": Replicate()}
    return {name: distribute_tensor(whole, mesh, [p]) for name, p in placements.items()}


def plain():
    dtypes = {n: of_dtype(dtype) for n, dtype in DTYPES.items() if n not in NEWER}
    return {"dtypes": dtypes, "values": values()}


def write(folder):
    state = {**training(filled=True), **plain(), "sharded": sharded(filled=True)}
    shardckpt.save(state, folder / "state")
    for name in sorted(NEWER & DTYPES.keys()):  # in one order on all ranks
        shardckpt.save({"w": of_dtype(DTYPES[name])}, folder / name)


def equal(first, second):
    """Whether two loaded states are equal, with types and dtypes."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, torch.Tensor):
        if hasattr(first, "full_tensor"):
            first, second = first.full_tensor(), second.full_tensor()
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second)]
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*bits)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    return type(first) is type(second) and first == second


def check(condition, what):
    if not condition:
        raise SystemExit(f"{what}: loaded and saved values differ")


def read(folder):
    wanted, found = training(filled=True), training(filled=False)
    shardckpt.load(found, folder / "state", keys=["model", "optimizer"])
    check(equal(wanted["model"].state_dict(), found["model"].state_dict()), "model")
    saved, loaded = wanted["optimizer"].state_dict(), found["optimizer"].state_dict()
    check(equal(saved["state"], loaded["state"]), "state of the optimizer")
    for group, other in zip(saved["param_groups"], loaded["param_groups"], strict=True):
        # a later torch may have saved more options
        check(equal(group, {key: other[key] for key in group}), "options of the optimizer")
    parts = {"sharded": sharded(filled=False)}
    shardckpt.load(parts, folder / "state", keys=["sharded"])
    check(equal(parts["sharded"], sharded(filled=True)), "sharded")
    with shardckpt.alone():
        check(equal(shardckpt.load_state(folder / "state", keys=list(plain())), plain()), "plain")
        shardckpt.verify(folder / "state")
        for name in NEWER:
            if (folder / name).exists():
                read_newer(folder / name, name)


def read_newer(path, name):
    try:
        loaded = shardckpt.load_state(path)["w"]
    except CheckpointError as error:
        check(name not in DTYPES and f"torch {torch.__version__}" in str(error), name)
    else:
        check(equal(loaded, of_dtype(DTYPES[name])), name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    {"write": write, "read": read}[arguments.action](arguments.folder)
    destroy_groups()


if __name__ == "__main__":
    main()
