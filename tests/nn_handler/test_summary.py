"""A handler as text."""

from __future__ import annotations

from tests.nn_handler.models import make


def test_a_summary_and_the_number_of_parameters():
    handler = make()
    handler.freeze_module("body")
    assert handler.count_parameters() == 67
    assert handler.count_parameters(trainable=True) == 27
    assert "head" in repr(handler)
    assert "67 parameters, 27 trainable" in repr(handler)
