"""Addresses of this machine, and receives that are complete."""

from __future__ import annotations

import socket

import pytest

from shardckpt.io import sockets
from shardckpt.io.sockets import own_address, receive_exactly


def test_the_address_is_that_of_the_interface_that_leads_to_the_host(monkeypatch):
    ways = {"store": "10.0.0.5", "here": "127.0.1.1", "me": "192.168.7.7"}
    monkeypatch.setattr(sockets, "_towards", lambda host: ways[host])
    monkeypatch.setattr(socket, "gethostname", lambda: "me")
    address = own_address.__wrapped__
    assert address("store", across_machines=True) == "10.0.0.5"
    assert address("store", across_machines=False) == "10.0.0.5"
    assert address("here", across_machines=False) == "127.0.1.1"
    assert address("here", across_machines=True) == "192.168.7.7", "others reach it"
    assert address(None, across_machines=False) == "127.0.0.1"
    assert address(None, across_machines=True) == "192.168.7.7"


def test_an_unknown_host_leads_to_the_loopback_interface(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    address = own_address.__wrapped__
    assert address("no-such-host.invalid", across_machines=True) == "127.0.0.1"
    assert address("127.0.0.1", across_machines=False) == "127.0.0.1"


def test_a_receive_is_complete_or_an_error():
    one, other = socket.socketpair()
    with one, other:
        for piece in (b"ab", b"c"):
            one.sendall(piece)
        assert receive_exactly(other, memoryview(bytearray(3))) == b"abc"
        other.settimeout(0.05)
        with pytest.raises(TimeoutError):
            receive_exactly(other, memoryview(bytearray(1)))
        one.sendall(b"d")
        one.close()
        with pytest.raises(ConnectionError):
            receive_exactly(other, memoryview(bytearray(2)))
