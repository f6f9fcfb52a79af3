"""Processes killed between two requests to a real object server, see store_kills.py."""

from __future__ import annotations

import pytest

from shardckpt.errors import CorruptionError
from tests.faults import store_kills
from tests.faults.store_kills import creates, loads, prunes, removes, replaces, with_base


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("operation", "step"),
    [
        pytest.param(creates, 5, marks=pytest.mark.long),
        pytest.param(with_base, 1, marks=pytest.mark.long),
        pytest.param(prunes, 1, marks=pytest.mark.long),
        pytest.param(removes, 1, marks=pytest.mark.long),
        pytest.param(loads, 1, marks=pytest.mark.long),
        pytest.param(creates, 1, marks=pytest.mark.long),
        pytest.param(replaces, 1, marks=pytest.mark.long),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_killed_between_two_requests(object_server, operation, step):
    assert store_kills.every_kill(object_server, [operation], step=step) > 1


@pytest.mark.parametrize(
    ("operation", "plant"),
    [pytest.param(replaces, "commit", marks=pytest.mark.long), (removes, "remove")],
    ids=["commit", "remove"],
)
def test_planted_faults_are_seen(object_server, operation, plant):
    """Shards are deleted before the manifest that names them: only a kill in between shows it."""
    with pytest.raises((AssertionError, CorruptionError), match=r"shard|acknowledged"):
        store_kills.every_kill(object_server, [operation], ["killed"], plant=plant)
