"""Saved on 1 to 4 ranks, loaded on 1 to 4, in every layout: bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

import shardckpt
from tests.distributed.jobs import KINDS, build, everything, step
from tests.ranks import FSDP2_ON_CPU, on_world_sizes, run_ranks

pytestmark = pytest.mark.ranks


def save_on(size: int, kind: str, folder: str) -> None:
    whole, optimizer = build(kind, seed=size)
    step(whole, optimizer)
    step(whole, optimizer)
    state = {"model": whole, "optimizer": optimizer, "step": 2}
    shardckpt.save(state, f"{folder}/{size}")
    expected = {"now": everything(whole, optimizer)}
    step(whole, optimizer)
    expected["next"] = everything(whole, optimizer)
    if dist.get_rank() == 0:
        torch.save(expected, f"{folder}/{size}.expected")


def load_on(size: int, kind: str, folder: str, sizes: Sequence[int]) -> None:
    for saved in sizes:
        expected = torch.load(f"{folder}/{saved}.expected", weights_only=True)
        whole, optimizer = build(kind, seed=99)
        if saved % 2:  # into an optimizer with state of its own, and into a fresh one
            step(whole, optimizer)
        state = {"model": whole, "optimizer": optimizer, "step": 0}
        report = shardckpt.load(state, f"{folder}/{saved}")
        assert state["step"] == 2
        assert report.saved_world_size == saved
        same(everything(whole, optimizer), expected["now"])
        if saved == size:
            step(whole, optimizer)
            same(everything(whole, optimizer), expected["next"])


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param("ddp", (1, 2, 3, 4), id="ddp"),
        pytest.param("hybrid", (4,), id="hybrid, 4"),
        *(
            pytest.param(kind, (1, 2, 3, 4), marks=pytest.mark.long, id=kind)
            for kind in KINDS
            if kind != "ddp"
        ),
    ],
)
def test_every_world_size_to_every_other(kind, sizes, tmp_path):
    if kind != "ddp" and not FSDP2_ON_CPU:
        pytest.skip("in this torch, FSDP2 needs GPUs")
    folder = str(tmp_path)
    run_ranks(4, on_world_sizes, sizes[::-1], save_on, kind, folder)
    run_ranks(4, on_world_sizes, sizes, load_on, kind, folder, sizes)
    for size in sizes:
        state = shardckpt.load_state(tmp_path / str(size))
        expected = torch.load(tmp_path / f"{size}.expected", weights_only=True)["now"]
        for name, tensor in state["model"].items():
            assert torch.equal(tensor, expected[name])
        for name, moments in state["optimizer"]["state"].items():
            for key, tensor in moments.items():
                assert torch.equal(tensor, expected[f"{name}/{key}"])
