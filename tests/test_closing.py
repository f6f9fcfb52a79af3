"""What a with block closes."""

from __future__ import annotations

import pytest

from shardckpt.closing import Closing


class Held(Closing):
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_closed_at_the_end_of_the_block():
    held = Held()
    with held as given:
        assert given is held
        assert held.closed == 0
    assert held.closed == 1


def test_closed_where_the_block_raises_which_goes_on():
    held = Held()
    with pytest.raises(ZeroDivisionError), held:
        raise ZeroDivisionError
    assert held.closed == 1
