"""A link handles messages in any order, over a communicator that sends none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from shardckpt.coordination.mpi import link as link_module
from shardckpt.coordination.mpi.link import Link, Message


class Comm:
    def Get_rank(self):
        return 0

    def Get_size(self):
        return 2

    def Get_group(self):
        return None

    def Idup(self):
        return self, SimpleNamespace(Test=lambda: True)


@pytest.fixture
def link(monkeypatch):
    monkeypatch.setattr(link_module, "load_mpi", SimpleNamespace)
    link = Link(Comm())
    link.sent = []
    link.send = lambda rank, message: link.sent.append((rank, message))
    return link


@pytest.mark.parametrize("call_comes_first", [True, False])
def test_a_call_that_crosses_the_message_that_it_is_late(link, call_comes_first):
    """The rank raises on reading the news, so its call must not meet rank 0's next one."""
    events = [
        lambda: link._deliver(1, Message("call", "c", text="n1 save a")),
        lambda: link.inform_late([1], "c", "save a"),
    ]
    for event in events if call_comes_first else reversed(events):
        event()
    assert link.sent == [(1, Message("late", "c", text="save a"))]
    assert link.take_calls("c") == {}
    link._deliver(1, Message("noted", "c"))
    link._deliver(1, Message("call", "c", text="n2 save a"))
    assert link.take_calls("c") == {1: ("n2", "save a")}


def test_a_message_about_an_older_call_is_noted(link):
    """It is noted, and forgotten once a later call is accepted."""
    link.asked["n"] = "c"
    link._deliver(0, Message("late", "c", text="save a"))
    assert link.sent == [(0, Message("noted", "c"))]
    assert link.late == {"c": "save a"}
    link._deliver(0, Message("verdict", "n", text="go 77"))
    assert link.late == {}
    assert list(link.inboxes) == ["77"]
