"""The states of random-number generators."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from shardckpt.io import devices
from shardckpt.state.random_state import random_state, seed_generators, set_random_state


def draws() -> list[float]:
    return [
        *np.random.normal(size=3).tolist(),
        np.random.rand(),
        random.random(),
        random.gauss(0, 1),
        torch.rand(()).item(),
    ]


@pytest.mark.parametrize("normals", range(4))
def test_the_state_at_every_point_gives_the_same_numbers_again(normals):
    seed_generators(7)
    for _ in range(3):
        for _ in range(normals):
            np.random.normal()  # every second one is kept for the next call
            random_state()
        state = random_state()
        assert str(random_state()) == str(state)
        found = draws()
        set_random_state(state)
        assert draws() == found


def test_another_generator_of_numpy():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.MT19937(3))
        state = random_state()
        found = draws()
        set_random_state(state)
        assert draws() == found
    finally:
        np.random.set_bit_generator(before)


def test_the_generator_of_the_device_is_in_the_state(monkeypatch):
    class Module:
        state = torch.tensor([1, 2])

        def get_rng_state(self):
            return self.state

        def set_rng_state(self, state):
            self.state = state

    module = Module()
    monkeypatch.setattr(devices.Accelerator, "kind", lambda self: "xpu")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    state = random_state()
    module.state = torch.tensor([3, 4])
    set_random_state({**state, "cuda": torch.tensor([5])})  # the checkpoint of another device
    assert module.state.tolist() == [1, 2]


@pytest.mark.parametrize(
    "change",
    [
        random.random,
        lambda: random.gauss(0, 1),
        lambda: random.shuffle([1, 2, 3]),
        lambda: random.getrandbits(3),
        lambda: random.seed(3),
        lambda: random.setstate(random.Random(5).getstate()),
    ],
)
def test_each_change_of_pythons_generator_is_seen(change):
    seed_generators(7)
    for _ in range(700):  # its memory is mixed again after 624 numbers
        assert random_state()["python"] == random.getstate()
        change()
