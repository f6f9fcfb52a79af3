"""The ranks of StoreCoordinator, each in a thread with a connection of its own."""

from __future__ import annotations

import datetime
import gc
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

import shardckpt
from shardckpt.coordination import store as torch_store
from shardckpt.coordination import store_connection as line_module
from shardckpt.coordination import store_keys as many_keys
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.store import StoreCoordinator
from shardckpt.coordination.store_connection import StoreConnections
from shardckpt.errors import RankFailedError
from tests.ranks import run_ranks

RANKS = 7


@pytest.fixture(params=["tcp", "file"])
def connect(request, tmp_path):
    """What makes a connection to a store; the one in a file has no requests for many keys."""
    if request.param == "file":
        return lambda: dist.FileStore(str(tmp_path / "store"), RANKS)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeout = datetime.timedelta(seconds=60)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)


def together(connect, work, ranks=RANKS):
    """What `work` returns or raises on each rank, and the keys that are left."""

    def run(rank):
        coordinator = StoreCoordinator(StoreConnections(connect), "op", rank=rank, world_size=ranks)
        try:
            return work(coordinator), coordinator
        except Exception as error:
            return error, coordinator
        finally:
            coordinator.close()

    with ThreadPoolExecutor(ranks) as pool:
        done = list(pool.map(run, range(ranks)))
    return [result for result, _ in done], [coordinator for _, coordinator in done]


def test_each_rank_gets_its_own_answer(connect, monkeypatch):
    """More ranks than keys in one request, and payloads in several pieces."""
    monkeypatch.setattr(many_keys, "_KEYS_AT_ONCE", 3)
    monkeypatch.setattr(torch_store, "_PIECE_BYTES", 100)

    def work(coordinator):
        own = bytes([coordinator.rank]) * (70 * coordinator.rank)
        first = exchange(coordinator, "one", lambda: own, lambda got: [p + b"!" for p in got])
        second = exchange(coordinator, "two", lambda: b"", lambda got: b"".join(got) + b"x" * 250)
        third = exchange(coordinator, "three", lambda: own, lambda got: b"".join(got))
        return first, second, third

    results, _ = together(connect, work)
    payloads = [bytes([rank]) * (70 * rank) for rank in range(RANKS)]
    for rank, (first, second, third) in enumerate(results):
        assert first == payloads[rank] + b"!"
        assert second == b"x" * 250
        assert third == b"".join(payloads)


def test_nothing_stays_in_the_store(connect):
    def work(coordinator):
        exchange(coordinator, "one", lambda: b"a", lambda got: got)
        return exchange(coordinator, "two", lambda: b"a", lambda got: b"b")

    results, coordinators = together(connect, work)
    assert results == [b"b"] * RANKS
    store = PrefixStore("op", connect())
    for coordinator in coordinators:
        for key in coordinator.traces():  # what the next operation removes
            store.delete_key(key)
    for phase in ("0-one", "1-two"):
        keys = [f"{phase}/n", f"{phase}/a"]
        keys += [f"{phase}/{way}/{rank}" for way in "sa" for rank in range(RANKS)]
        assert not any(store.check([key]) for key in keys)
    assert not any(store.check([f"beat/{rank}"]) for rank in range(RANKS))


def test_ranks_that_are_not_there_are_named(connect, monkeypatch):
    monkeypatch.setattr(many_keys, "_KEYS_AT_ONCE", 2)
    absent = {2, 5}
    all_there = threading.Barrier(
        RANKS, lambda: monkeypatch.setenv("SHARDCKPT_DEADLINE_S", str(5.0))
    )

    def work(coordinator):
        all_there.wait(60)
        if coordinator.rank in absent:
            coordinator.close()
            return None
        return exchange(coordinator, "one", lambda: b"a", lambda got: b"b")

    results, _ = together(connect, work)
    for rank, result in enumerate(results):
        assert (result is None) == (rank in absent)
        assert rank in absent or isinstance(result, RankFailedError)
    assert set(results[0].rank) == absent


@pytest.mark.parametrize("next_call", ["save b", "save a"])
def test_a_rank_that_comes_just_as_it_is_given_up(connect, monkeypatch, next_call):
    """It has looked whether it is late, and calls once rank 0 has given up and calls again."""
    given_up, asking = threading.Event(), threading.Event()

    def uuid4():  # what a rank calls after it has looked
        if threading.current_thread() is late_rank and not given_up.is_set():
            asking.set()
            given_up.wait(60)
        return uuid.uuid4()

    def call(rank, subject):
        with torch_store._operation(
            StoreConnections(connect), "p", subject, rank=rank, world_size=2
        ):
            return subject

    def come_late():
        with pytest.raises(RankFailedError) as caught:
            call(1, "save a")
        found.append(caught.value.rank)
        found.append(call(1, next_call))

    found: list[object] = []
    late_rank = threading.Thread(target=come_late)
    monkeypatch.setattr(torch_store, "uuid", SimpleNamespace(uuid4=uuid4))
    monkeypatch.setenv("SHARDCKPT_ARRIVAL_DEADLINE_S", str(0.2))
    late_rank.start()
    asking.wait(60)
    with pytest.raises(RankFailedError):
        call(0, "save a")
    monkeypatch.setenv("SHARDCKPT_ARRIVAL_DEADLINE_S", str(60.0))
    given_up.set()
    assert call(0, next_call) == next_call
    late_rank.join(60)
    assert found == [(1,), next_call]


def test_a_store_that_takes_no_connection(monkeypatch):
    monkeypatch.setenv("SHARDCKPT_DEADLINE_S", str(0.2))
    done = threading.Event()
    with pytest.raises(RankFailedError, match="does not answer") as caught:
        StoreCoordinator(StoreConnections(lambda: done.wait(60)), "op", rank=1, world_size=2)
    done.set()
    assert caught.value.facts["phase"] == "begin"


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
    monkeypatch.setattr(line_module, "_FORGOTTEN_S", 0.0)
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


def test_a_message_is_bounded(monkeypatch):
    """The server needs time that grows with the square of a message's length."""
    sent = []

    class Store:
        def has_extended_api(self):
            return True

        def set(self, key, value):
            sent.append([(key, value)])

        def multi_set(self, keys, values):
            sent.append(list(zip(keys, values, strict=True)))

    small = {f"k{index}": b"x" * 150 for index in range(200)}
    large = {f"l{index}": b"x" * 100_000 for index in range(3)}
    many_keys.set_many(Store(), small)
    many_keys.set_many(Store(), large)
    many_keys.set_many(Store(), {})
    assert [pair for message in sent for pair in message] == [*small.items(), *large.items()]
    assert max(map(len, sent)) == 64
    assert all(len(message) == 1 for message in sent[-3:])


def several_saves(folder: str) -> tuple[int, int]:
    """Connections made for five saves, and groups that are remembered at the end."""
    made = []
    connect = line_module.StoreConnection.__init__

    def counted(line, *arguments):
        made.append(line)
        connect(line, *arguments)

    line_module.StoreConnection.__init__ = counted
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
