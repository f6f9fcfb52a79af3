"""Paths, URLs and storages that a user passes lead to a storage and a full path."""

from __future__ import annotations

import pytest
import torch

import shardckpt
from shardckpt.errors import CheckpointNotFoundError, StateError
from shardckpt.storage.memory import MemoryStorage

STATE = {"w": torch.arange(300_000.0), "frozen": torch.ones(7), "step": 3}


def loads(path) -> bool:
    state = shardckpt.load_state(path)
    return torch.equal(state["w"], STATE["w"]) and state["step"] == 3


def test_urls_of_memory_are_checked_and_normalized(tmp_path):
    for url in ("memory://", "memory://b//x", "memory://b/../x"):
        with pytest.raises(StateError, match="Invalid URL"):
            shardckpt.save(STATE, url)
    shardckpt.save(STATE, "MEMORY://tests/upper/")
    assert loads("memory://tests/upper")
    with pytest.raises(CheckpointNotFoundError):
        shardckpt.load_state("memory://tests/nothing")
    with pytest.raises(StateError, match="can't be used"):
        shardckpt.save(STATE, "memory://tests/x", storage=shardckpt.LocalStorage())


def test_a_scheme_of_the_user():
    storage = MemoryStorage()

    class Mine(MemoryStorage):
        def full_path(self, path):
            return super().full_path(path.replace("mine://", "memory://mine/"))

    storage = Mine()
    shardckpt.register_storage("Mine", lambda url: storage)
    shardckpt.save(STATE, "mine://a")
    assert loads("mine://a")
    assert torch.equal(shardckpt.load_state("memory://mine/a", storage=storage)["w"], STATE["w"])
    for scheme in ("file", "", "a b", "x"):
        with pytest.raises(StateError, match="Invalid scheme"):
            shardckpt.register_storage(scheme, lambda url: storage)
