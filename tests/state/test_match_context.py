"""A match notes reads, mismatches and used entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardckpt.errors import StateError
from shardckpt.state.materialize import NOTHING
from tests.state.saved import Saved


@pytest.fixture(scope="module")
def saved():
    shared = torch.arange(4.0)
    return Saved({"w": shared, "tied": shared, "b": torch.ones(2), "n": 5, "m": {"x": shared + 1}})


def test_a_plain_tensor_is_filled_at_its_address(saved):
    context, tensor = saved.context(), torch.zeros(4)
    assert context.fill_in_place(tensor, "w")
    ((_, chunk),) = context.reads
    assert chunk.address == tensor.data_ptr()
    assert context.used == {"w"}
    saved.read(context.reads)
    assert tensor.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(5),
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(8)[::2],
        torch.zeros(4, device="meta"),
        torch.zeros(1).expand(4),
    ],
    ids=["shape", "dtype", "strides", "meta", "expanded"],
)
def test_another_tensor_is_left_to_the_full_match(saved, tensor):
    context = saved.context()
    assert not context.fill_in_place(tensor, "w")
    assert (context.reads, context.used) == ([], set())
    assert not context.fill_in_place(torch.zeros(4), "n")
    assert not context.fill_in_place(torch.zeros(4), "absent")


def test_one_memory_is_not_filled_with_two_saved_tensors(saved):
    context, tensor = saved.context(), torch.zeros(4)
    assert context.fill_in_place(tensor, "w")
    assert context.fill_in_place(tensor, "tied")
    assert not context.fill_in_place(tensor, "m.x")
    with pytest.raises(StateError, match="same memory") as caught:
        context.fill(context.find("m.x", tensor), tensor, "m.x")
    assert caught.value.tensor == "m.x"


def test_elements_that_share_memory_can_not_be_filled(saved):
    context = saved.context()
    with pytest.raises(StateError, match="share memory"):
        context.fill(context.find("w", torch.zeros(4)), torch.zeros(1).expand(4), "w")


def test_a_name_that_was_not_saved_is_missing_and_a_value_is_not_a_tensor(saved):
    context = saved.context()
    assert context.find("w", torch.zeros(4))[0] == "w"
    assert context.find("absent", torch.zeros(4)) is None
    assert context.find("n", torch.zeros(4)) is None
    context.note_missing_and_unused()
    assert context.mismatches.missing == ["absent"]
    assert context.mismatches.wrong_dtype == [("n", "a tensor", "int")]
    assert context.used == {"w", "n"}


@pytest.mark.parametrize(
    ("saved_dtype", "wanted", "converts"),
    [
        (torch.float32, torch.float16, True),
        (torch.float32, torch.complex64, True),
        (torch.complex64, torch.float32, False),
        (torch.uint8, torch.uint4, False),
        (torch.uint4, torch.uint8, False),
    ],
)
def test_a_cast_loses_no_imaginary_part_and_converts_no_opaque_dtype(
    saved, saved_dtype, wanted, converts
):
    assert saved.context(cast=True).may_convert(saved_dtype, wanted) == converts
    assert not saved.context().may_convert(saved_dtype, wanted)


def test_a_cast_is_noted(saved):
    context = saved.context(cast=True)
    entry = context.find("w", torch.zeros(4))[1]
    assert context.agrees(entry, torch.zeros(4, dtype=torch.float16), "w")
    assert context.cast == [("w", "torch.float32", "torch.float16")]
    assert not context.agrees(entry, torch.zeros(3), "w")
    assert context.fits(entry, torch.zeros(4, dtype=torch.float16))
    assert not context.fits(entry, torch.zeros(3))


def test_an_unused_entry_fails_a_strict_load_only_below_a_module(saved):
    context = saved.context()
    context.fill_in_place(torch.zeros(4), "w")
    context.owners.append("m")
    context.note_missing_and_unused()
    assert set(context.mismatches.unexpected) == {"tied", "b", "n", "m.x"}
    assert context.strict_mismatches().unexpected == ["m.x"]


def test_a_value_is_built_with_the_tensors_of_another_where_they_fit(saved):
    context, like = saved.context(), {"x": torch.zeros(4)}
    built = context.build("m", like=like)
    assert built["x"] is like["x"]
    saved.read(context.reads)
    assert like["x"].tolist() == [1, 2, 3, 4]
    other = {"x": torch.zeros(3)}
    assert context.build("m", like=other)["x"] is not other["x"]
    assert context.build("absent") is NOTHING
    assert context.mismatches.missing == ["absent"]


def test_the_versions_of_filled_tensors_increase(saved):
    context, parameter = saved.context(), nn.Parameter(torch.zeros(4))
    before = parameter._version
    assert context.fill_in_place(parameter, "w")
    context.mark_changed()
    assert parameter._version == before + 1
