"""A checkpoint per format version, saved by two ranks once and read for ever."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

import shardckpt
from shardckpt.format.safetensors_header import parse_chunk_name

GOLDEN = Path(__file__).parent / "golden"


def a_state(rank: int):
    """The state in the golden checkpoint. `model.sharded` was a DTensor, sharded along dim 1."""
    weight = torch.arange(12.0).reshape(3, 4)
    return {
        "model": {
            "sharded": torch.arange(15, dtype=torch.int16).reshape(3, 5),
            "weight": weight,
            "tied": weight,
            "half": torch.tensor([0.5, -0.0, math.inf, math.nan], dtype=torch.bfloat16),
            "flags": torch.tensor([True, False]),
            "scalar": torch.tensor(7, dtype=torch.int64),
            "empty": torch.empty(0, 3),
            "complex": torch.tensor([1 + 2j]),
        },
        "array": np.array([[1, 2], [3, 4]], dtype=np.uint32),
        "values": {
            1: "an int key",
            "1": "a string key",
            "none": None,
            "big": 2**70,
            "nan": math.nan,
            "inf": [math.inf, -math.inf],
            "tuple": (1, (2.5, True), ()),
            "empty": {},
            "bytes": b"\x00\xff",
            "text": "\u00e9\U0001f600",
            "set": {3, 1},
            "dtype": torch.bfloat16,
            "size": torch.Size([2, 3]),
        },
        "rng": shardckpt.PerRank({"rank": rank, "own": torch.full((2,), rank)}),
    }


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tolist() == b.tolist()
    return type(a) is type(b) and str(a) == str(b)


@pytest.mark.parametrize("version", [1])
def test_reads_what_was_saved(version):
    path = GOLDEN / f"v{version}"
    found = shardckpt.load_state(path)
    assert [own["rank"] for own in found["rng"]] == [0, 1]
    assert [own["own"].tolist() for own in found.pop("rng")] == [[0, 0], [1, 1]]
    expected = a_state(0)
    del expected["rng"]
    assert same(expected, found)
    assert found["model"]["weight"] is found["model"]["tied"]
    with shardckpt.open_checkpoint(path) as checkpoint:
        checkpoint.verify()
        assert checkpoint.manifest.format_version == version
        assert checkpoint.manifest.world_size == 2


@pytest.mark.parametrize("version", [1])
def test_the_safetensors_library_reads_the_shards(version):
    boxes = {}
    for rank in range(2):
        name = f"shard-{rank:05d}-of-00002.safetensors"
        with safetensors.safe_open(GOLDEN / f"v{version}" / name, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                if key.startswith("model.sharded"):
                    boxes[parse_chunk_name(key)[1]] = shard.get_tensor(key).tolist()
    whole = torch.arange(15).reshape(3, 5)
    assert boxes == {
        ((0, 0), (3, 3)): whole[:, :3].tolist(),
        ((0, 3), (3, 2)): whole[:, 3:].tolist(),
    }
