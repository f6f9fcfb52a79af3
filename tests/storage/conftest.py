"""Fixtures of the tests of storages."""

import uuid

import pytest

from shardckpt import TieredStorage


@pytest.fixture
def url():
    """A URL in memory below which there is nothing."""
    return f"memory://tests/{uuid.uuid4().hex}"


@pytest.fixture
def tiers(tmp_path, url):
    """A storage of a local folder, whose checkpoints are copied to `url`."""
    made = TieredStorage(tmp_path / "fast", url)
    yield made
    made.wait(60)
