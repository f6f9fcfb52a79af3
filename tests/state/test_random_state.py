"""The random-number generators of a process, saved and restored."""

from __future__ import annotations

import random

import numpy as np
import torch

import shardckpt
from shardckpt.state.random_state import random_state, seed_generators, set_random_state


def draw():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(), random.gauss(0, 1)


def test_the_generators_continue_where_they_were(tmp_path):
    seed_generators(2**40 + 1)
    random.gauss(0, 1)  # leaves a second number behind
    np.random.randn()
    shardckpt.save({"random": shardckpt.PerRank(random_state())}, tmp_path / "c")
    expected = draw()
    seed_generators(0)
    assert draw() != expected
    state = {"random": shardckpt.PerRank(random_state())}
    shardckpt.load(state, tmp_path / "c")
    set_random_state(state["random"].value)
    assert draw() == expected


def test_seeds_repeat():
    seed_generators(3)
    first = draw()
    seed_generators(3)
    assert draw() == first
