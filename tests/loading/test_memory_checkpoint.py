"""A state in memory that is read like a checkpoint."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt.errors import CorruptionError, LoadMismatchError, StateError
from shardckpt.format.manifest import from_bytes
from shardckpt.loading.memory_checkpoint import StateStorage

STATE = {
    "w": torch.arange(600_000.0),
    "t": torch.arange(6).reshape(2, 3).t(),
    "n": [1, ("a", None)],
}


def test_the_state_is_loaded_with_all_checks():
    storage = StateStorage(STATE)
    state = {"w": torch.zeros(600_000), "t": torch.zeros(3, 2, dtype=torch.int64), "n": [0, 0]}
    shardckpt.load(state, "file.pt", storage=storage)
    assert all(torch.equal(state[name], STATE[name]) for name in ("w", "t"))
    assert state["n"] == STATE["n"]
    with pytest.raises(LoadMismatchError) as caught:
        shardckpt.load({"w": torch.zeros(2)}, "file.pt", storage=storage)
    assert caught.value.path == "file.pt"
    with shardckpt.open_checkpoint("file.pt", storage=storage) as checkpoint:
        assert checkpoint["w"][7:9].tolist() == [7, 8]


def test_equal_states_have_equal_checkpoint_ids():
    def identity(state):
        text = StateStorage(state).open("p").manifest()
        return from_bytes(text, path="p").checkpoint_id

    assert identity(STATE) == identity({**STATE, "w": STATE["w"].clone()})
    assert identity(STATE) != identity({**STATE, "n": 2})
    assert identity(STATE) != identity({**STATE, "w": STATE["w"] + 1})


def test_a_tensor_that_changes_meanwhile_is_detected():
    w = torch.ones(9)
    storage = StateStorage({"w": w})
    w[3] = 2
    with pytest.raises(CorruptionError):
        shardckpt.load_state("p", storage=storage)


def test_a_state_in_memory_can_not_be_written_to():
    with pytest.raises(StateError, match="can't be written to"):
        shardckpt.save({"a": 1}, "p", storage=StateStorage(STATE))
