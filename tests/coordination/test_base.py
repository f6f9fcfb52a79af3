"""Each coordinator has the interface that operations use."""

from __future__ import annotations

import inspect

import pytest

from shardckpt.coordination.base import Coordinator, WorkBroken
from shardckpt.coordination.mpi.coordinator import MpiCoordinator
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.coordination.store import StoreCoordinator

METHODS = [
    name for name, _ in inspect.getmembers(Coordinator, inspect.isfunction) if name[0] != "_"
]


@pytest.mark.parametrize("cls", [SingleCoordinator, StoreCoordinator, MpiCoordinator])
def test_a_coordinator_has_every_method_with_its_parameters(cls):
    assert METHODS == ["gather", "progress", "scatter", "watch"]
    for name in METHODS:
        expected = inspect.signature(getattr(Coordinator, name)).parameters
        found = inspect.signature(getattr(cls, name)).parameters
        assert {n: p.kind for n, p in found.items()} == {n: p.kind for n, p in expected.items()}


def test_broken_work_is_no_error_that_a_user_catches():
    """It must not pass for an error of a rank, as the rank that failed has the reason."""
    assert WorkBroken.__bases__ == (Exception,)
