"""All ranks open one checkpoint, and it fits their states."""

from __future__ import annotations

import pytest
import torch

from shardckpt.coordination.exchange import attempt
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import DirectoryNotSharedError, LoadMismatchError, NotACheckpointError
from shardckpt.loading.agreement import Shares, agree_on_reads, open_manifest, same_checkpoint
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.state.matching import match_state
from shardckpt.state.saved_tree import SavedState


def test_ranks_that_opened_another_checkpoint_than_rank_0_are_named():
    decide = same_checkpoint("here")
    assert decide([b"a", b"a"]) == b""
    with pytest.raises(DirectoryNotSharedError) as caught:
        decide([b"a", b"b", b"a", b"c"])
    assert (caught.value.rank, caught.value.path) == ((1, 3), "here")
    assert (caught.value.expected, caught.value.actual) == ("checkpoint a", "checkpoint b")


def agree(template, *, strict):
    opened = open_manifest(StateStorage({"w": torch.ones(2), "n": 1}), "here")
    matched = match_state(template, SavedState(opened[1]), rank=0, world_size=1, cast=False)
    stages = attempt(lambda: opened), attempt(lambda: matched)
    return agree_on_reads(SingleCoordinator(), "here", *stages, strict=strict)


def test_a_state_that_fits_is_accepted():
    assert agree({"w": torch.zeros(2)}, strict=True) == (0.0, Shares.NOTHING)


def test_mismatches_end_a_strict_load_alone():
    with pytest.raises(LoadMismatchError) as caught:
        agree({"w": torch.zeros(3)}, strict=True)
    assert caught.value.path == "here"
    assert agree({"w": torch.zeros(3)}, strict=False)[0] == 0.0


def test_the_files_are_closed_if_the_manifest_is_refused():
    class Files:
        path, closed = "here", False

        def manifest(self):
            return b"{}"

        def close(self):
            self.closed = True

    files = Files()
    storage = type("Storage", (), {"open": lambda self, path: files})()
    with pytest.raises(NotACheckpointError):
        open_manifest(storage, "here")
    assert files.closed
