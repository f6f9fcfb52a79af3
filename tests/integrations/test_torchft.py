"""torchft: one replica group writes; all load. The how-to page runs real replicas."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.errors import StateError
from tests.ranks import PRELOAD, run_ranks

torchft = pytest.importorskip("torchft")

from torchft.coordination import LighthouseServer  # noqa: E402

from shardckpt.integrations.torchft import is_writer, load, save  # noqa: E402

PRELOAD += ["torchft"]
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]


def train(lighthouse: str, path: str, steps: int, path_to_load: str) -> dict[str, Any]:
    """A replica group of one rank, which trains together with the others."""
    replica = dist.get_rank()
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=datetime.timedelta(seconds=30)),
        load_state_dict=lambda values: None,
        state_dict=dict,
        min_replica_size=2,
        use_async_quorum=False,
        init_sync=False,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica_{replica}",
    )
    if path_to_load:
        load(manager, state, path_to_load)
    start = manager.current_step()
    while manager.current_step() < start + steps:
        manager.start_quorum()
        model(torch.full((2, 4), 1.0 + replica)).sum().backward()
        for parameter in model.parameters():
            manager.allreduce(parameter.grad).wait()
        if manager.should_commit():
            optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(StateError, match="torchft"):
        save(manager, {"torchft": 1}, path)
    report = save(manager, state, path)
    found = {
        "writer": is_writer(manager),
        "saved": report is not None,
        "steps": (start, manager.current_step()),
        "weights": model.weight.tolist(),
    }
    manager.shutdown(wait=False)
    return found


def test_one_group_writes_and_all_resume_at_its_step(tmp_path):
    def run(*arguments):
        lighthouse = LighthouseServer(bind="[::]:0", min_replicas=2, join_timeout_ms=1000)
        try:
            return run_ranks(2, train, lighthouse.address(), *arguments)
        finally:
            lighthouse.shutdown()

    whole = run(str(tmp_path / "whole"), 4, "")
    first = run(str(tmp_path / "first"), 2, "")
    second = run(str(tmp_path / "second"), 2, str(tmp_path / "first"))
    for results in (whole, first, second):
        assert sorted(one["saved"] for one in results) == [False, True]
        assert [one["writer"] for one in results] == [one["saved"] for one in results]
        assert results[0]["weights"] == results[1]["weights"]
    assert [one["steps"] for one in second] == [(2, 4), (2, 4)]
    assert second[0]["weights"] == whole[0]["weights"]
    assert shardckpt.load_state(tmp_path / "first")["torchft"]["step"] == 2
