"""The layout of a job, and the collectives of training."""

from __future__ import annotations

import pytest

from shardckpt import NNHandler, errors
from tests.nn_handler.models import Net


def test_an_unknown_parallel():
    with pytest.raises(errors.StateError, match="parallel"):
        NNHandler(Net, parallel="magic")
