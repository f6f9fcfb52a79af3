"""The agreement of the ranks, and the end of the transaction that it begins."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.saving import agreement, commit, rank_writer
from shardckpt.storage.local import LocalStorage, LocalTransaction
from tests.ranks import run_ranks


@pytest.fixture
def calls(monkeypatch):
    """The names of the calls that end a transaction, in order."""
    made = []
    for name in ("commit", "abandon", "close"):
        method = getattr(LocalTransaction, name)

        def noted(self, *arguments, name=name, method=method):
            made.append(name)
            method(self, *arguments)

        monkeypatch.setattr(LocalTransaction, name, noted)
    return made


def fails(*arguments, **options):
    raise ValueError("planted")


def test_after_a_save_it_is_closed(tmp_path, calls):
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    assert calls == ["commit", "close"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (agreement, "global_plan"),
        (rank_writer, "write_shard"),
        (rank_writer, "replica_digests"),
        (commit, "compare_replicas"),
        (commit, "to_bytes"),
    ],
)
def test_after_an_error_in_any_stage_it_is_abandoned(tmp_path, monkeypatch, calls, module, name):
    monkeypatch.setattr(module, name, fails)
    state = {name: torch.ones(3)}  # a plan that no test before has left in the cache
    with pytest.raises(ValueError, match="planted"):
        shardckpt.save(state, tmp_path / "c", storage=LocalStorage())
    assert calls[0] == "abandon"
    assert "close" in calls
    assert "commit" not in calls
    monkeypatch.undo()
    shardckpt.save(state, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def save_in_two_groups(folder: str) -> list[str]:
    """Rank 1 writes the second part in one group and the first part in the other one."""
    wrong = []
    groups = {name: dist.new_group(ranks) for name, ranks in (("a", [0, 1]), ("b", [1, 2]))}
    state = {f"layer{number}": torch.full((64, 64), float(number)) for number in range(4)}
    for number in (1, 2):  # the plan of the second save is known
        for name, group in groups.items():
            if dist.get_rank(group) >= 0:
                path = f"{folder}/{name}{number}"
                shardckpt.save(state, path, process_group=group)
                found = {key: torch.zeros(64, 64) for key in state}
                shardckpt.load(found, path, process_group=group)
                wrong += [
                    f"{path} {key}" for key in state if not torch.equal(found[key], state[key])
                ]
    return wrong


def test_a_process_that_has_different_ranks_in_two_groups(tmp_path):
    assert run_ranks(3, save_in_two_groups, str(tmp_path)) == [[], [], []]
