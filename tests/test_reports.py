"""The reports of save and load about their time."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import shardckpt
from tests.ranks import run_ranks

SAVE = {"plan", "write", "sync", "compare"}
LOAD = {"open", "match", "read", "place"}


def test_one_process_has_its_profile(tmp_path):
    state = {"a": torch.randn(1000), "n": 1}
    saved = shardckpt.save(state, tmp_path / "c")
    assert set(saved.profile) == {0}
    assert set(saved.profile[0]) - {"divide"} == SAVE | {"commit"}
    loaded = shardckpt.load(state, tmp_path / "c")
    assert {rank: set(seconds) for rank, seconds in loaded.profile.items()} == {0: LOAD}
    for report in (saved, loaded):
        assert all(seconds >= 0 for seconds in report.profile[0].values())
        assert sum(report.profile[0].values()) <= sum(report.seconds.values())


def both(path):
    state = {"a": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    saved, loaded = shardckpt.save(state, path), shardckpt.load(state, path)
    return dist.get_rank(), saved.profile, loaded.profile


@pytest.mark.ranks
def test_rank_0_has_every_ranks(tmp_path):
    for rank, saved, loaded in run_ranks(3, both, str(tmp_path / "c")):
        expected = {0, 1, 2} if rank == 0 else {rank}
        assert set(saved) == set(loaded) == expected
        assert all(set(seconds) >= SAVE for seconds in saved.values())
        assert all(set(seconds) == LOAD for seconds in loaded.values())
        assert all(("commit" in seconds) == (number == 0) for number, seconds in saved.items())
