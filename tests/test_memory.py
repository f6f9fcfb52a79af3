"""Saving and loading take buffers of memory, not copies of the state: by the peak of a process."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

import pytest
import torch

import shardckpt
from shardckpt import NNHandler, PerRank

STATE_BYTES = 88 << 20
BUFFERS_BYTES = 56 << 20
"""Three buffers of 8 MiB to write, one for each of two readers, and room for what threads take."""

MEASURE = """
import json, sys
import torch
import shardckpt
from shardckpt.saving import shard_writer as writer

folder = sys.argv[1]

def now(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

def peak_of(call):
    "Bytes by which the peak during the call is above what the process held before."
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = now("VmRSS:")
    kept = call()
    return now("VmHWM:") - before

state = {
    "large": torch.ones(10 << 20),
    "view": torch.ones(2048, 4096)[:, ::2],
    "half": torch.ones(8 << 20, dtype=torch.float16),
    **{f"small{n}": torch.ones(1 << 14) for n in range(256)},
}
shardckpt.save({"warm": torch.ones(9)}, f"{folder}/warm")  # imports, the first buffers
shardckpt.load({"warm": torch.ones(9)}, f"{folder}/warm")
found = {
    "save": peak_of(lambda: shardckpt.save(state, f"{folder}/c")),
    "load": peak_of(lambda: shardckpt.load(state, f"{folder}/c")),
    "disk": peak_of(lambda: shardckpt.load_state(f"{folder}/c", device_map="disk")),
    "rows": peak_of(lambda: shardckpt.open_checkpoint(f"{folder}/c")["large"][:99]),
}
del state
found["load_state"] = peak_of(lambda: shardckpt.load_state(f"{folder}/c"))

state = shardckpt.load_state(f"{folder}/c")
parts, copies = writer.contiguous_pieces, []
def copying(tensor):
    copies.extend(tensor.clone() for _ in range(4))
    return parts(copies[-1])
writer.contiguous_pieces, writer.plain_address = copying, lambda tensor: 0
found["planted copies"] = peak_of(lambda: shardckpt.save(state, f"{folder}/d"))
print(json.dumps(found))
"""


@pytest.mark.timeout(240)
def test_save_and_load_stay_within_buffers(tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell peaks of memory")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env={**os.environ, "SHARDCKPT_READ_THREADS": "2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    for call in ("save", "load", "disk", "rows"):
        assert found[call] < BUFFERS_BYTES, found
    assert found["load_state"] < STATE_BYTES + BUFFERS_BYTES, found
    # The measure is one: a save that keeps copies of the state is seen to take all that.
    assert found["planted copies"] > STATE_BYTES + BUFFERS_BYTES, found


def a_state():
    module = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    rank_value = PerRank({"x": torch.ones(2000)})
    return {"m": module, "o": optimizer, "t": torch.ones(5000), "r": rank_value}


def tensors_in_memory():
    tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    return sum(tensor.numel() > 1000 for tensor in tensors)


FREED = {
    "save": lambda: shardckpt.save(a_state(), "new", overwrite=True),
    "async_save": lambda: shardckpt.async_save(a_state(), "new", overwrite=True).result(),
    "load": lambda: shardckpt.load(a_state(), "shards"),
    "load_state": lambda: shardckpt.load_state("shards"),
    "handler": lambda: NNHandler.load("handler.safetensors"),
    **{
        f"{source} to {to}": lambda source=source, to=to, suffix=suffix: shardckpt.convert(
            source, f"{to}{suffix}", to=to, keys=["m", "o", "t"], overwrite=True
        )
        for source in ("shards", "x.pth", "x.safetensors", "x-dcp")
        for to, suffix in (("torch", ".pth"), ("safetensors", ".safetensors"), ("dcp", ""))
    },
}


@pytest.mark.parametrize("name", FREED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_are_freed_at_once(name, tmp_path, monkeypatch):
    """Nothing that refers to itself holds tensors until the garbage collector runs."""
    monkeypatch.chdir(tmp_path)
    shardckpt.save(a_state(), "shards")
    for target, to in (("x.pth", "torch"), ("x.safetensors", "safetensors"), ("x-dcp", "dcp")):
        shardckpt.convert("shards", target, to=to)
    NNHandler(torch.nn.Linear, in_features=100, out_features=100).save("handler.safetensors")
    FREED[name]()  # create the objects that are made once
    gc.collect()
    gc.disable()
    try:
        before = tensors_in_memory()
        FREED[name]()
        assert tensors_in_memory() == before
    finally:
        gc.enable()
