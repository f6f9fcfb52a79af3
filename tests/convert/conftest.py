"""A saved checkpoint for the tests of convert."""

from __future__ import annotations

import pytest

import shardckpt
from tests.convert.states import whole_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    shardckpt.save(whole_state(), path)
    return str(path)
