"""Requests to a store for many keys."""

from __future__ import annotations

import pytest

from shardckpt.coordination import store_keys


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
    store_keys.set_many(Store(), small)
    store_keys.set_many(Store(), large)
    store_keys.set_many(Store(), {})
    assert [pair for message in sent for pair in message] == [*small.items(), *large.items()]
    assert max(map(len, sent)) == 64
    assert all(len(message) == 1 for message in sent[-3:])


class Plain:
    """A store; requests for many keys are an extension."""

    def __init__(self, *, extended):
        self.extended, self.items, self.requests = extended, {}, []

    def has_extended_api(self):
        return self.extended

    def check(self, keys):
        self.requests.append(("check", len(keys)))
        return all(key in self.items for key in keys)

    def get(self, key):
        return self.items[key]

    def set(self, key, value):
        self.items[key] = value

    def multi_get(self, keys):
        assert self.extended
        self.requests.append(("get", len(keys)))
        return [self.items[key] for key in keys]

    def multi_set(self, keys, values):
        assert self.extended
        self.items.update(zip(keys, values, strict=True))


@pytest.mark.parametrize("extended", [True, False])
def test_the_values_of_many_keys_come_back_in_the_order_of_the_keys(extended):
    store = Plain(extended=extended)
    items = {f"k{number}": b"%d" % number for number in range(130)}
    store_keys.set_many(store, items)
    keys = list(reversed(items))
    assert store_keys.get_many(store, keys) == [items[key] for key in keys]
    assert store.requests == ([("get", 64), ("get", 64), ("get", 2)] if extended else [])


def test_all_keys_must_be_there():
    store = Plain(extended=False)
    store.items = dict.fromkeys((f"k{number}" for number in range(100)), b"")
    assert store_keys.all_there(store, list(store.items))
    assert store_keys.all_there(store, [])
    assert not store_keys.all_there(store, [*store.items, "other"])
    assert max(count for _, count in store.requests) <= 64


def test_keys_are_divided_into_requests():
    keys = list("abcdefg")
    assert list(store_keys.batches(keys, 3)) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert list(store_keys.batches(keys, 0)) == [[key] for key in keys]
    assert list(store_keys.batches([], 3)) == []
