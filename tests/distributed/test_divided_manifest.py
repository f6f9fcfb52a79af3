"""Ranks that check a manifest together load what they saved, and all refuse a hostile manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shardckpt
from shardckpt import errors
from shardckpt.format import divided_manifest, manifest
from tests.faults.hostile import seal
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

WORLD = 3
NAMES = ("a", "b", "c", "d", "e")


def a_state(fill: float) -> dict[str, Any]:
    """Tensors of which each rank holds some rows, and one that all hold."""
    mesh = init_device_mesh("cpu", (WORLD,))
    sharded = {
        name: DTensor.from_local(
            torch.full((2, 3), fill + number * WORLD + dist.get_rank()), mesh, [Shard(0)]
        )
        for number, name in enumerate(NAMES)
    }
    return {**sharded, "whole": torch.full((4,), fill)}


def local(state: dict[str, Any]) -> dict[str, list[Any]]:
    return {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).tolist()
        for name, tensor in state.items()
    }


def shared_bytes(document: dict[str, Any]) -> None:
    """The second chunk of "e" is at the bytes of the one of "a"."""
    tensors = document["tensors"]
    tensors["e"]["chunks"][7:10] = tensors["a"]["chunks"][7:10]


def hole(document: dict[str, Any]) -> None:
    del document["tensors"]["c"]["chunks"][:7]


def beyond(document: dict[str, Any]) -> None:
    document["tensors"]["d"]["chunks"][14] = WORLD


ATTACKS: tuple[Callable[[dict[str, Any]], None], ...] = (shared_bytes, hole, beyond)


def load_all(folder: str) -> None:
    for module in (manifest, divided_manifest):
        module.LARGE_BYTES = 0
    divided_manifest.LONG_BYTES = 0
    saved, path = a_state(1.0), f"{folder}/good"
    shardckpt.save(saved, path)
    state = a_state(0.0)
    shardckpt.load(state, path)
    assert local(state) == local(saved)
    if dist.get_rank() == 0:
        for attack in ATTACKS:
            shutil.copytree(path, f"{folder}/{attack.__name__}")
            file = Path(folder, attack.__name__, "manifest.json")
            document = json.loads(file.read_bytes())
            attack(document)
            file.write_bytes(seal(document))
    dist.barrier()
    for attack in ATTACKS:
        state = a_state(0.0)
        with pytest.raises(errors.CorruptionError):
            shardckpt.load(state, f"{folder}/{attack.__name__}")
        assert local(state) == local(a_state(0.0)), attack
    if dist.get_rank() == 1:  # parts of two texts don't form one text
        part = divided_manifest.CheckedPart
        divided_manifest.CheckedPart = lambda digest, ranges: part(digest="0" * 32, ranges=ranges)
    with pytest.raises(errors.DirectoryNotSharedError, match="digest"):
        shardckpt.load(state, path)


def test_three_ranks_check_a_manifest_together(tmp_path):
    run_ranks(WORLD, load_all, str(tmp_path))
