"""Addresses and receives of TCP sockets."""

from __future__ import annotations

import functools
import ipaddress
import socket
from contextlib import suppress

__all__ = ["own_address", "receive_exactly"]

_LOOPBACK = "127.0.0.1"


@functools.cache
def own_address(host: str | None, *, across_machines: bool) -> str:
    """Return the address of this machine on the interface that leads to a host.

    Args:
        host: The name or address of the host, such as that of the store, or None.
        across_machines: Whether other machines must reach the address. Then it is that of the name
            of this machine if the host is this machine and leads to a loopback interface.
    """
    for name in (host, socket.gethostname() if across_machines else None):
        with suppress(OSError, ValueError):
            found = _towards(name) if name else _LOOPBACK
            if not (across_machines and ipaddress.ip_address(found).is_loopback):
                return found
    return _LOOPBACK


def _towards(host: str) -> str:
    """Return the address from which this machine reaches a host. Sends nothing."""
    family, kind, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def receive_exactly(connection: socket.socket, view: memoryview) -> memoryview:
    """Fill a view with the bytes that arrive, and return it.

    Raises:
        ConnectionError: The other side closed the connection.
        TimeoutError: Nothing arrives in time.
    """
    rest = view
    while rest:
        count = connection.recv_into(rest)
        if not count:
            raise ConnectionError("the other side has ended the transfer")
        rest = rest[count:]
    return view
