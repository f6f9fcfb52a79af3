"""Settings and fixtures for the tests of NNHandler."""

import pytest
import torch

from shardckpt.nn_handler import trust

# Tiny models: more threads than one cost time, and the ranks of the tests have one as well.
torch.set_num_threads(1)


@pytest.fixture
def untrusted(monkeypatch):
    """This process as it began, before the tests trusted anything."""
    monkeypatch.setattr(trust, "_prefixes", set())
    monkeypatch.setattr(trust, "_objects", {})
