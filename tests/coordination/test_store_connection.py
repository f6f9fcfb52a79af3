"""Connections to a store are kept, and abandoned when they hang."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.coordination import store as torch_store
from shardckpt.coordination import store_connection
from shardckpt.coordination.store_connection import StoreConnection, StoreConnections
from shardckpt.errors import RankFailedError
from tests.ranks import run_ranks


def test_connections_are_kept(connect, monkeypatch):
    made = []

    def counted():
        made.append(connect())
        return made[-1]

    connections = StoreConnections(counted)
    for _ in range(3):
        with connections.connection() as line, connections.connection() as other:
            line.below("a").set("key", "value")
            assert line.below("a").check(["key"])  # set() does not wait for the store
            assert other.below("a").check(["key"])
    assert len(made) == 2
    with pytest.raises(ZeroDivisionError), connections.connection() as line:
        line.ask(lambda: 1 / 0)
    for _ in range(2):  # the one that has failed is gone
        with connections.connection(), connections.connection():
            pass
    assert len(made) == 3
    monkeypatch.setattr(store_connection, "_FORGOTTEN_S", 0.0)
    with connections.connection():
        pass
    assert len(made) == 4
    connections.close()


def test_an_interrupted_call_takes_its_answer_along(connect):
    """Ctrl-c while a call is under way: its answer must not be taken for that of the next one."""
    connections = StoreConnections(connect)
    with connections.connection() as first:
        first.below("a").set("key", "value")

    def interrupted(timeout):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), connections.connection() as line:
        assert line is first
        answers = line._answers
        line._answers = SimpleNamespace(get=interrupted, put=answers.put)
        try:
            line.below("a").check(["key"])
        finally:
            line._answers = answers
    with connections.connection() as line:
        assert line.below("a").get("key") == b"value"
    connections.close()


def several_saves(folder: str) -> tuple[int, int]:
    """Connections made for five saves, and groups that are remembered at the end."""
    made = []
    connect = store_connection.StoreConnection.__init__

    def counted(line, *arguments):
        made.append(line)
        connect(line, *arguments)

    store_connection.StoreConnection.__init__ = counted
    for number in range(5):
        shardckpt.save({"a": torch.ones(3)}, f"{folder}/{number}")
    dist.destroy_process_group()
    gc.collect()
    return len(made), len(torch_store._connections)


@pytest.mark.ranks
def test_saves_share_a_connection(tmp_path):
    for connections, groups in run_ranks(2, several_saves, str(tmp_path)):
        assert 1 <= connections <= 2  # a second one for signs of life, where a save takes long
        assert groups == 0


def test_a_call_that_hangs_ends_at_the_deadline_and_its_connection_is_not_used_again(monkeypatch):
    monkeypatch.setenv("SHARDCKPT_DEADLINE_S", "0.2")
    hangs = threading.Event()
    made = []

    def connect():
        made.append(dist.HashStore())
        return made[-1]

    connections = StoreConnections(connect)
    with connections.connection() as connection:
        with pytest.raises(RankFailedError, match="does not answer"):
            connection.ask(lambda: hangs.wait(60))
        assert connection.hangs
        asked = []
        with pytest.raises(RankFailedError):
            connection.ask(lambda: asked.append(1))
        assert asked == []
    with connections.connection() as other:
        assert other is not connection
    assert len(made) == 2
    hangs.set()


def test_a_connection_returns_and_raises_what_the_call_does():
    connection = StoreConnection(dist.HashStore)
    assert connection.ask(lambda: 7) == 7
    connection.below("a").set("key", "value")
    assert connection.below("a").get("key") == b"value"
    assert not connection.below("b").check(["key"])
    assert not connection.failed
    with pytest.raises(ZeroDivisionError):
        connection.ask(lambda: 1 // 0)
    assert connection.failed
    assert connection.ask(lambda: 8) == 8
    assert connection.failed
    connection.close()
