"""The error that lists all mismatches of a load."""

from __future__ import annotations

import pytest

from shardckpt.errors import LoadMismatchError
from shardckpt.state.mismatches import Mismatches, check_unused


def test_without_mismatches_there_is_no_error():
    assert Mismatches().error("p") is None
    assert Mismatches().only_unexpected


def test_one_error_lists_every_mismatch():
    shape, dtype = ("w", [2], [3]), ("v", "torch.int8", "torch.float32")
    error = Mismatches(["a"], ["b"], [shape], [dtype]).error("here")
    assert error.path == "here"
    assert error.facts["missing"] == ("a",)
    assert error.facts["unexpected"] == ("b",)
    assert error.facts["wrong_shape"] == (shape,)
    assert error.facts["wrong_dtype"] == (dtype,)
    assert error.tensor is None
    for line in (
        "missing in the checkpoint: a",
        "saved, but not used by the state: b",
        "shape of w: expected [2], found [3]",
        "dtype of v: expected torch.int8, found torch.float32",
    ):
        assert line in str(error)


def test_the_remedy_names_the_arguments_for_these_mismatches():
    dtype = Mismatches(wrong_dtype=[("w", "a", "b")]).error("p").remedy
    assert "dtype='cast'" in dtype
    assert "rename=" not in dtype
    missing = Mismatches(missing=["a"]).error("p").remedy
    assert "rename=" in missing
    assert "shardckpt inspect" in missing
    assert "cast" not in missing


def test_the_error_for_a_single_mismatch_names_its_tensor():
    assert Mismatches(missing=["layer.w"]).error("p").tensor == "layer.w"
    assert Mismatches(wrong_shape=[("w", [2], [3])]).error("p").tensor == "w"
    assert Mismatches(wrong_dtype=[("w", "a", "b")]).error("p").tensor == "w"
    assert Mismatches(missing=["a"], wrong_shape=[("w", [2], [3])]).error("p").tensor is None


@pytest.mark.parametrize("field", ["missing", "wrong_shape", "wrong_dtype"])
def test_other_mismatches_than_unexpected_ones_are_distinguished(field):
    assert Mismatches(unexpected=["a"]).only_unexpected
    assert not Mismatches(unexpected=["a"], **{field: [("b", 1, 2)]}).only_unexpected


def test_ranks_of_different_stages_use_different_entries():
    check_unused([["b", "c"], ["a", "c"], ["a", "b"]], "p")
    check_unused([[], []], "p")


def test_an_entry_that_no_rank_uses_is_an_error():
    with pytest.raises(LoadMismatchError) as caught:
        check_unused([["a", "x", "y"], ["b", "y", "x"]], "p")
    assert caught.value.facts["unexpected"] == ("x", "y")


def test_a_rank_that_uses_only_a_part_of_the_entries_of_another_is_an_error():
    with pytest.raises(LoadMismatchError) as caught:
        check_unused([["a"], ["a", "b"], ["c", "d"]], "p")
    error = caught.value
    assert error.facts["unexpected"] == ("b",)
    assert (error.rank, error.facts["used_by_rank"]) == (1, 0)
