"""A checkpoint is rewritten as another number of shards of even size."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import CheckpointExistsError, StateError
from shardckpt.maintenance.reshard import even_plan, reshard, rewrite
from shardckpt.storage.local import LocalStorage

STATE = {"w": torch.arange(2_000_000.0), "b": torch.ones(5), "step": 3}


@pytest.fixture
def source(tmp_path):
    shardckpt.save({**STATE, "r": shardckpt.PerRank(4)}, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as opened:
        yield opened


@pytest.mark.parametrize("shards", [1, 3])
def test_the_shards_have_even_sizes_and_the_same_entries(tmp_path, source, shards):
    seen = []
    reshard(
        source, str(tmp_path / "d"), shards=shards, storage=LocalStorage(), progress=seen.append
    )
    sizes = [path.stat().st_size for path in (tmp_path / "d").glob("shard-*")]
    assert len(sizes) == shards
    assert max(sizes) - min(sizes) < 10_000
    assert seen[-1] >= 8_000_020
    state = shardckpt.load_state(tmp_path / "d")
    assert torch.equal(state["w"], STATE["w"])
    assert (state["step"], state["r"]) == (3, [4])
    with shardckpt.open_checkpoint(tmp_path / "d") as opened:
        opened.verify()
        assert opened.metadata().world_size == 1  # the ranks that saved


def test_a_checkpoint_is_replaced_only_on_request(tmp_path, source):
    shardckpt.save({"other": 1}, tmp_path / "d")
    options = {"shards": 2, "storage": LocalStorage()}
    with pytest.raises(CheckpointExistsError):
        reshard(source, str(tmp_path / "d"), **options)
    assert shardckpt.load_state(tmp_path / "d") == {"other": 1}
    reshard(source, str(tmp_path / "d"), overwrite=True, **options)
    assert shardckpt.load_state(tmp_path / "d")["step"] == 3


def test_a_number_of_shards_below_one_is_refused(source):
    with pytest.raises(StateError, match="number of shards"):
        even_plan(source, 0)


class Noted:
    """A rewrite that notes its stages and fails in one."""

    def __init__(self, fails=""):
        self.calls, self.fails = [], fails

    def __getattr__(self, name):
        def stage(*arguments):
            self.calls.append(name)
            if name == self.fails:
                raise ZeroDivisionError
            return b"token"

        return stage


def test_the_stages_of_a_rewrite_run_in_order():
    work = Noted()
    rewrite(work, SingleCoordinator(), print)
    assert work.calls == ["begin", "join", "write", "commit", "close"]


@pytest.mark.parametrize("stage", ["begin", "join", "write", "commit"])
def test_a_rewrite_that_fails_is_abandoned_and_closed(stage):
    work = Noted(stage)
    with pytest.raises(ZeroDivisionError):
        rewrite(work, SingleCoordinator(), print)
    assert work.calls[-3:] == [stage, "abandon", "close"]
