"""An option takes several values."""

from __future__ import annotations

import pytest

from shardckpt.cli.parameters import separate


@pytest.mark.parametrize(
    ("given", "separated"),
    [
        ("convert --keys a b --json s t", "convert --keys a --keys b --json s t"),
        ("convert s t --rename a= =b", "convert s t --rename a= --rename =b"),
        ("inspect p --keys --json", "inspect p --keys --json"),
        ("inspect p --keys", "inspect p --keys"),
        ("inspect --keys a -- p", "inspect --keys a -- p"),
    ],
)
def test_an_option_with_several_values(given, separated):
    assert separate(given.split()) == separated.split()
