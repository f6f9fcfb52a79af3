"""The ranks of StoreCoordinator, each in a thread with a connection of its own."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from torch.distributed.distributed_c10d import PrefixStore

from shardckpt.coordination import store as torch_store
from shardckpt.coordination import store_keys
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.store import StoreCoordinator
from shardckpt.coordination.store_connection import StoreConnections
from shardckpt.errors import RankFailedError
from tests.coordination.conftest import RANKS


def together(connect, work, ranks=RANKS):
    """Return the result or error of `work` on each rank, and the keys that remain."""

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
    monkeypatch.setattr(store_keys, "_KEYS_AT_ONCE", 3)
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
    monkeypatch.setattr(store_keys, "_KEYS_AT_ONCE", 2)
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
