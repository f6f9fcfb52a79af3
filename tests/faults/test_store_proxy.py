"""A real object server whose answers fail, see tests/faults/store_proxy.py; and a fault in our code
that it must see."""

from __future__ import annotations

import contextlib

import pytest

from shardckpt.errors import ShardckptError
from shardckpt.storage import object_clients
from shardckpt.storage.object_store import ObjectTransaction
from tests.faults import store_proxy
from tests.faults.store_proxy import creates, loads, removes, replaces
from tests.faults.test_stores import trusting


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("twice", 9),
        ("torn", 1),  # of which there is one in an upload
        *(
            pytest.param(kind, 4, marks=pytest.mark.long)
            for kind in store_proxy.KINDS
            if kind != "torn"
        ),
    ],
)
def test_some_requests_fail(object_server, kind, step):
    seen = store_proxy.every_fault(object_server, [kind], [creates, replaces], step=step)
    assert seen[kind] > 2


@pytest.mark.long
def test_requests_of_loads_and_removals_fail(object_server):
    seen = store_proxy.every_fault(object_server, ["late", "stale"], [loads, removes], step=3)
    assert seen["late"] > 3
    assert seen["stale"] > 3


def careless(self):
    with contextlib.suppress(Exception):
        self._writer.close()


@pytest.mark.parametrize(
    ("owner", "name", "instead", "kind"),
    [
        (ObjectTransaction, "commit", trusting, "twice"),
        (object_clients._ClientUpload, "finish", careless, "torn"),
    ],
    ids=["trusts a 412", "takes a torn upload for a whole one"],
)
def test_planted_faults_are_seen(object_server, monkeypatch, owner, name, instead, kind):
    monkeypatch.setattr(owner, name, instead)
    with pytest.raises((AssertionError, ShardckptError)):
        store_proxy.every_fault(object_server, [kind], [creates])
