"""A model that FSDP2 divides is saved and loaded by dcp.save and dcp.load on other world sizes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from shardckpt.integrations.dcp import (
    ReshardLoadPlanner,
    ShardReader,
    ShardSavePlanner,
    ShardWriter,
)
from tests.distributed import jobs
from tests.ranks import FSDP2_ON_CPU, on_world_sizes, run_ranks

pytestmark = pytest.mark.ranks


def save_and_load(size: int, folder: str, saved_on: int, own: bool) -> None:
    model, optimizer = jobs.build("fsdp", 3 if size == saved_on else 4)
    if size == saved_on:
        jobs.step(model, optimizer)
        whole = jobs.everything(model, optimizer)
        states = get_state_dict(model, optimizer)
        planner = ShardSavePlanner() if own else None
        dcp.save(
            {"model": states[0], "optimizer": states[1]},
            storage_writer=ShardWriter(f"{folder}/c"),
            planner=planner,
        )
        if dist.get_rank() == 0:
            torch.save(whole, f"{folder}/whole.pt")
        return
    states = get_state_dict(model, optimizer)
    state = {"model": states[0], "optimizer": states[1]}
    planner = ReshardLoadPlanner() if own else None
    dcp.load(state, storage_reader=ShardReader(f"{folder}/c"), planner=planner)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    found = jobs.everything(model, optimizer)
    expected = torch.load(f"{folder}/whole.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def reshard_with_dcp(folder: str, own: bool) -> None:
    on_world_sizes((3, 2, 1), save_and_load, folder, 3, own)


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="in this torch, FSDP2 needs GPUs")
@pytest.mark.parametrize("own", [False, True], ids=["dcp planners", "own planners"])
def test_resharding_through_dcp(tmp_path, own):
    run_ranks(3, reshard_with_dcp, str(tmp_path), own)
