"""The end of a process that has a process group."""

from __future__ import annotations

import atexit

import pytest
import torch.distributed as dist

from shardckpt.coordination import shutdown


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(shutdown, "_GLOO_S", 0.0)


def test_the_default_group_is_destroyed():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    shutdown.destroy_groups()
    assert not dist.is_initialized()


def test_the_threads_of_gloo_get_the_lock_before_the_group_is_destroyed(monkeypatch):
    done = []
    monkeypatch.setattr(shutdown.time, "sleep", lambda _: done.append("sleep"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy"))
    shutdown.destroy_groups()
    assert done == ["sleep", "destroy"]


def test_without_a_group_nothing_is_destroyed(monkeypatch):
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("destroyed"))
    shutdown.destroy_groups()


def test_leaving_is_registered_once(monkeypatch):
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(
        atexit, "unregister", lambda function: registered.clear() if function in registered else 0
    )
    shutdown.destroy_groups_at_exit()
    shutdown.destroy_groups_at_exit()
    assert registered == [shutdown.destroy_groups]
