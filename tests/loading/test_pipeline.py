"""The stages of a load, in order."""

from __future__ import annotations

import gc

import pytest
import torch

from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import LoadMismatchError
from shardckpt.loading import pipeline
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.loading.pipeline import LoadOptions, run_load
from shardckpt.storage.base import CheckpointFiles

SAVED = {"w": torch.arange(4.0), "n": 7}


def load(state, *, strict=True, cast=False):
    return run_load(
        state,
        "here",
        coordinator=SingleCoordinator(),
        storage=StateStorage(SAVED),
        options=LoadOptions(strict=strict, cast=cast),
    )


def test_a_load_fills_the_state_and_reports_what_it_did():
    state = {"w": torch.zeros(4, dtype=torch.float64), "n": 0}
    report = load(state, cast=True)
    assert (state["w"].tolist(), state["n"]) == ([0, 1, 2, 3], 7)
    assert report.cast == (("w", "torch.float32", "torch.float64"),)
    assert (report.path, report.saved_world_size) == ("here", 1)
    assert report.bytes_read >= 16
    assert set(report.seconds) == {"plan", "read"}
    assert {"open", "match", "read", "place"} <= set(report.profile[0])


def test_a_mismatch_leaves_the_state_unchanged():
    state = {"w": torch.zeros(4), "n": 0, "absent": torch.zeros(1)}
    with pytest.raises(LoadMismatchError):
        load(state)
    assert (state["w"].tolist(), state["n"]) == ([0, 0, 0, 0], 0)
    assert load(state, strict=False).missing == ("absent",)
    assert state["n"] == 7


def test_an_error_of_a_read_is_raised_before_values_are_put_back(monkeypatch):
    def fail(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "read_all", fail)
    state = {"w": torch.zeros(4), "n": 0}
    with pytest.raises(ZeroDivisionError):
        load(state)
    assert state["n"] == 0


@pytest.mark.parametrize(
    ("little_bytes", "remote", "runs"),
    [(64 << 20, False, False), (0, False, True), (64 << 20, True, True)],
)
def test_the_collector_runs_again_before_long_reads(monkeypatch, little_bytes, remote, runs):
    enabled = []
    read = pipeline.read_all

    def read_all(*arguments, **options):
        enabled.append(gc.isenabled())
        return read(*arguments, **options)

    monkeypatch.setattr(pipeline, "read_all", read_all)
    monkeypatch.setattr(pipeline, "_LITTLE_BYTES", little_bytes)
    monkeypatch.setattr(CheckpointFiles, "remote", remote)
    load({"w": torch.zeros(4), "n": 0})
    assert enabled == [runs]
    assert gc.isenabled()
    with pytest.raises(LoadMismatchError):
        load({"absent": torch.zeros(4)})
    assert gc.isenabled()
