"""The values in a checkpoint have their types, or the error names the field."""

from __future__ import annotations

import copy

import torch

from shardckpt import NNHandler, errors
from shardckpt.loading.memory_checkpoint import StateStorage
from shardckpt.nn_handler import loading
from shardckpt.nn_handler.handler_source import HandlerSource
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
