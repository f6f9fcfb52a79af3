"""A transaction that was begun is closed after a save, and abandoned first if the save fails."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt.saving import agreement, commit, rank_writer
from shardckpt.storage.local import LocalStorage, LocalTransaction


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
