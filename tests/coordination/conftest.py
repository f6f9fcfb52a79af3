"""Connections to a store for the tests of this folder."""

from __future__ import annotations

import datetime

import pytest
import torch.distributed as dist

RANKS = 7


@pytest.fixture(params=["tcp", "file"])
def connect(request, tmp_path):
    """A function that connects to a store. The store in a file has no requests for many keys."""
    if request.param == "file":
        return lambda: dist.FileStore(str(tmp_path / "store"), RANKS)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeout = datetime.timedelta(seconds=60)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)
