"""The values in a checkpoint have their types, or the error names the field."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from shardckpt import NNHandler, errors
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.nn_handler import loading
from shardckpt.nn_handler.handler_source import HandlerSource
from shardckpt.nn_handler.saved import Config, SavedPosition, Scaler, Sums, check_random, checked
from shardckpt.state.random_state import random_state
from tests.faults import handler_attacks as attacks


def leaves(value, at=()):
    """The places of everything in a state, outer ones first."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*at, key)
        if isinstance(item, (dict, list, tuple)):
            yield from leaves(item, (*at, key))


WRONG = [None, -1, 3.5, "x", [1], {"x": 1}, torch.ones(2), 1 << 90]


def test_every_field_of_a_wrong_type_is_a_typed_error(monkeypatch):
    """Every value in what is not a tensor, removed, and replaced by two others."""
    whole = attacks.base().state()
    small = {k: whole[k] for k in ("config", "progress", "callbacks", "scheduler", "scaler")}
    ranks = [whole["ranks"].value]
    ranks[0]["random"]["python"] = ranks[0]["random"]["numpy"] = "x"  # not each of 600 numbers
    kinds = set()
    for number, place in enumerate(leaves(small)):
        for wrong in (..., WRONG[number % 8], WRONG[(3 * number + 1) % 8]):
            changed = copy.deepcopy(small)
            *outer, last = place
            found = changed
            for key in outer:
                found = found[key]
            if isinstance(found, tuple):
                continue
            if wrong is ...:
                del found[last]
            else:
                found[last] = wrong
            state = {**{k: v for k, v in whole.items() if k != "ranks"}, **changed}
            source = HandlerSource(path="c", storage=StateStorage(state), ranks=ranks)
            monkeypatch.setattr(loading, "open_handler", lambda path, source=source: source)
            try:
                NNHandler.load("c", device="cpu")
            except errors.ShardckptError as error:
                assert error.tensor or isinstance(error, errors.NotACheckpointError), (place, wrong)
                kinds.add(type(error))
            else:
                raise AssertionError("the random numbers are malformed")
    assert errors.CheckpointError in kinds


MODEL = {"class": {"shardckpt.import": "a:B"}, "kwargs": {}}
OPTIMIZER = {"optimizer": {"class": {"shardckpt.import": "a:B"}}}


def test_values_that_fit_become_structs():
    config = checked({"model": MODEL, "optimizers": {"rest": OPTIMIZER}}, Config, "", path="c")
    assert config.model.class_name == {"shardckpt.import": "a:B"}
    assert (config.optimizers["rest"].optimizer.options, config.callbacks) == ({}, [])
    assert checked({"sums": {"loss": 1}}, Sums, "ranks", path="c").counts == {}


@pytest.mark.parametrize(
    ("cls", "value", "at", "field"),
    [
        (Config, {"model": {**MODEL, "kwargs": 3}}, "config", "config.model.kwargs"),
        (Config, {"model": {"class": {}}}, "config", "config.model.kwargs"),
        (Config, {}, "", "model"),
        (Config, {"model": MODEL, "frozen": ["a", 3]}, "", "frozen[1]"),
        (Config, 3, "", "config"),
        (Scaler, {"scale": "x"}, "scaler", "scaler.scale"),
        (Sums, {"sums": {"loss": "x"}}, "ranks", "ranks.sums[...]"),
        (SavedPosition, {"samples": -1}, "position", "position.samples"),
    ],
)
def test_the_error_names_the_field(cls, value, at, field):
    with pytest.raises(errors.CheckpointError, match="malformed") as caught:
        checked(value, cls, at, path="c")
    assert (caught.value.path, caught.value.tensor) == ("c", field)
    assert "initialize_from_checkpoint" in caught.value.remedy


@pytest.mark.parametrize("name", ["main", "a.b", "", "3"])
def test_the_names_of_optimizers_are_words(name):
    with pytest.raises(errors.CheckpointError) as caught:
        checked({"model": MODEL, "optimizers": {name: OPTIMIZER}}, Config, "", path="c")
    assert caught.value.actual == "Expected words other than main as names of optimizers"


@pytest.mark.parametrize(("seed", "fits"), [(-(1 << 63), 1), ((1 << 64) - 1, 1), (1 << 64, 0)])
def test_a_seed_has_64_bits(seed, fits):
    value = {"samples": 0, "batches": 0, "length": 0, "seed": seed}
    if fits:
        assert checked(value, SavedPosition, "position", path="c").seed == seed
    else:
        with pytest.raises(errors.CheckpointError, match="malformed"):
            checked(value, SavedPosition, "position", path="c")


def replaced(state, part, at, value):
    """The state of the generators with another value in one place."""
    found = dict(state)
    items = list(found[part])
    if part == "python" and type(at) is tuple:
        inner = list(items[1])
        inner[at[0]] = value
        items[1] = tuple(inner)
    else:
        items[at] = value
    found[part] = tuple(items)
    return found


def test_the_state_of_the_generators_is_checked():
    state = random_state()
    check_random(state, "ranks.random", path="c")
    check_random({**state, "loader": [torch.Generator().get_state()]}, "a", path="c")
    for wrong in (
        {},
        None,
        {**state, "torch": torch.zeros(3, dtype=torch.uint8)},
        {**state, "loader": [torch.zeros(3, dtype=torch.uint8)]},
        replaced(state, "python", (0,), 1 << 32),
        replaced(state, "python", (-1,), 625),  # the index of the next number
        replaced(state, "python", (0,), 0.5),
        replaced(state, "python", 2, "x"),
        replaced(state, "numpy", 0, "PCG64"),
        replaced(state, "numpy", 1, np.zeros(623, np.uint32)),
        replaced(state, "numpy", 2, 625),  # numpy would read beyond its memory
        replaced(state, "numpy", 2, -1),
    ):
        with pytest.raises(errors.CheckpointError, match="random-number generators") as caught:
            check_random(wrong, "ranks.random", path="c")
        assert caught.value.tensor == "ranks.random"
