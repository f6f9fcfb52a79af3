"""Differences between two checkpoints, by digest and by value."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp

import shardckpt
from shardckpt import PerRank, errors
from shardckpt.analysis.diff import count_differences
from shardckpt.format.dtypes import DTYPES, SAVED

SIZE = 1 << 20


def state(**changes):
    torch.manual_seed(0)
    return {
        "model": {"a": torch.randn(SIZE), "b": torch.randn(SIZE), "tied": torch.zeros(2)},
        "step": 3,
        "rng": PerRank({"seed": 1}),
        **changes,
    }


@pytest.fixture
def first(tmp_path):
    path = str(tmp_path / "first")
    shardckpt.save(state(), path)
    return path


def test_equal_checkpoints_are_equal_without_reading(first, tmp_path):
    shardckpt.save(state(), tmp_path / "second")
    found = shardckpt.diff(first, tmp_path / "second")
    assert found.equal
    assert (found.equal_tensors, found.equal_values, found.bytes_read) == (3, 2, 0)


def test_only_blocks_that_differ_are_read(first, tmp_path):
    changed = state()
    changed["model"]["b"][7] += 0.5
    changed["model"]["b"][8] = math.nan
    shardckpt.save(changed, tmp_path / "second")
    found = shardckpt.diff(first, tmp_path / "second")
    assert list(found.tensors) == ["model.b"]
    assert found.tensors["model.b"].elements == 2
    assert math.isnan(found.tensors["model.b"].largest)
    assert 0 < found.bytes_read <= 2 << 20  # a block, and the end of the neighbour that shares it
    assert not found.equal


@pytest.mark.parametrize("other_format", ["dcp", "torch", "safetensors", "reshard"])
def test_other_formats_and_layouts_are_compared_by_value(other_format, first, tmp_path):
    second = str(
        tmp_path / {"torch": "x.pth", "safetensors": "x.safetensors"}.get(other_format, "x")
    )
    if other_format == "reshard":
        shardckpt.reshard(first, second, shards=3)
    elif other_format == "dcp":
        dcp.save({"model": state()["model"], "step": 3}, checkpoint_id=second)
    else:
        shardckpt.convert(first, second)
    keys = ["model", "step"] if other_format == "dcp" else None
    assert shardckpt.diff(first, second, keys=keys).equal
    changed = state()
    changed["model"]["a"][-1] += 1
    shardckpt.save(changed, tmp_path / "changed")
    found = shardckpt.diff(tmp_path / "changed", second, keys=keys)
    assert list(found.tensors) == ["model.a"]
    assert found.tensors["model.a"].elements == 1
    assert found.tensors["model.a"].largest == pytest.approx(1)


@pytest.mark.parametrize(
    "shape", [(3 << 20,), (3, 1 << 20), (1 << 20, 3), (3 << 10, 1 << 5, 1 << 5)]
)
def test_changes_anywhere_in_a_tensor_are_found(shape, tmp_path):
    w = torch.zeros(shape)
    shardckpt.save({"v": torch.ones(5), "w": w}, tmp_path / "c")
    for at in (0, 1, 262_139, 262_140, 262_144, 1_500_000, w.numel() - 1):
        changed = w.clone()
        changed.view(-1)[at] = 2
        shardckpt.save({"v": torch.ones(5), "w": changed}, tmp_path / "d", overwrite=True)
        found = shardckpt.diff(tmp_path / "c", tmp_path / "d")
        assert list(found.tensors) == ["w"], at
        assert (found.tensors["w"].elements, found.tensors["w"].largest) == (1, 2.0)


def test_several_changes_in_one_row_are_counted_once(tmp_path):
    w = torch.zeros(2, 3 << 20)  # a row has 12 blocks
    shardckpt.save({"w": w}, tmp_path / "c")
    w[1, [1 << 19, 3 << 19, 5 << 19]] = 1
    shardckpt.save({"w": w}, tmp_path / "d")
    found = shardckpt.diff(tmp_path / "c", tmp_path / "d")
    assert found.tensors["w"].elements == 3
    assert found.bytes_read == 3 << 22  # the row


def test_entries_values_dtypes_and_shapes_that_differ_are_listed(first, tmp_path):
    changed = state(step=4, rng=PerRank({"seed": 2}), more=torch.ones(1))
    changed["model"] = {"a": torch.zeros(SIZE, dtype=torch.float64), "b": torch.zeros(3), "tied": 1}
    shardckpt.save(changed, tmp_path / "second")
    found = shardckpt.diff(first, tmp_path / "second")
    assert found.values == {"step": (3, 4), "rng.0.seed": (1, 2)}
    assert found.only_first == ("model.tied",)
    assert set(found.only_second) == {"more", "model.tied"}
    assert found.tensors["model.a"].dtypes == (torch.float32, torch.float64)
    assert found.tensors["model.b"].shapes == ((SIZE,), (3,))
    assert found.tensors["model.a"].elements is None


def test_keys_and_rename(first, tmp_path):
    shardckpt.save({"net": state()["model"], "step": 9}, tmp_path / "second")
    found = shardckpt.diff(first, tmp_path / "second", keys="net", rename={"model": "net"})
    assert found.equal
    assert found.equal_tensors == 3
    with pytest.raises(errors.LoadMismatchError, match="modle"):
        shardckpt.diff(first, tmp_path / "second", keys="modle")


def test_types_of_values_count_and_nan_is_equal_to_nan(tmp_path):
    for name, one in (("a", 1), ("b", True), ("c", 1.0)):
        shardckpt.save({"x": one, "nan": math.nan}, tmp_path / name)
    assert shardckpt.diff(tmp_path / "a", tmp_path / "b").values == {"x": (1, True)}
    assert set(shardckpt.diff(tmp_path / "a", tmp_path / "c").values) == {"x"}


def test_a_corrupted_block_is_an_error_not_a_difference(first, tmp_path):
    shardckpt.reshard(first, tmp_path / "second", shards=3)
    shard = next((tmp_path / "second").glob("shard-00001*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(errors.CorruptionError):
        shardckpt.diff(first, tmp_path / "second")


@pytest.mark.parametrize("tolerance", [{"rtol": -1}, {"atol": math.nan}, {"rtol": "much"}])
def test_a_tolerance_must_be_a_number(tolerance, first):
    with pytest.raises(errors.StateError, match="Invalid"):
        shardckpt.diff(first, first, **tolerance)


def test_elements_within_the_tolerance_are_equal():
    a, b = torch.tensor([1.0, 100.0, math.inf, math.nan]), torch.tensor([1.1, 101.0, math.inf, 1.0])
    assert count_differences(a, b)[0] == 3
    assert count_differences(a, b, atol=0.2)[0] == 2
    assert count_differences(a, b, rtol=0.2)[0] == 1
    assert count_differences(torch.tensor([0.0, math.nan]), torch.tensor([-0.0, -math.nan])) == (
        0,
        0.0,
    )
    for infinite in (math.inf, -math.inf):
        finite = torch.tensor([5.0, math.inf]), torch.tensor([infinite, infinite])
        assert count_differences(*finite, rtol=0.5, atol=1)[0] == 1 + (infinite < 0)
    large = torch.tensor([2**62, 5])
    assert count_differences(large, large + torch.tensor([1, 0])) == (1, 1.0)  # float64 rounds both
    assert count_differences(large, large + torch.tensor([2, 0]), rtol=1e-30, atol=1) == (1, 2.0)
    assert count_differences(large, large + torch.tensor([2, 0]), atol=2) == (0, 0.0)
    ends = torch.tensor([-(2**63), 2**63 - 1])
    assert count_differences(ends, ends.flip(0), atol=1) == (2, 2.0**64)
    assert count_differences(ends[:1], ends[:1].view(torch.uint64), atol=1) == (1, 2.0**64)


@pytest.mark.parametrize("dtype", sorted(SAVED, key=str), ids=str)
def test_every_dtype_is_compared(dtype):
    zeros = torch.zeros(64, dtype=torch.uint8).view(dtype)
    ones = torch.ones(64, dtype=torch.uint8).view(dtype)
    assert count_differences(zeros, zeros.clone() if dtype.itemsize > 1 else zeros) == (0, 0.0)
    assert count_differences(zeros, ones)[0] == len(zeros)


def compared(a, b, tmp_path, **tolerance):
    for name, tensor in (("a", a), ("b", b)):
        shardckpt.save({"w": tensor}, tmp_path / name, overwrite=True)
    return shardckpt.diff(tmp_path / "a", tmp_path / "b", **tolerance)


@pytest.mark.parametrize("other_format", ["c.pth", "c"])
def test_rounded_values_are_equal_within_the_eps_of_their_dtype(tmp_path, other_format):
    first = tmp_path / "first"
    shardckpt.save({"model": {"a": torch.randn(300), "tied": torch.zeros(2)}, "n": 1}, first)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = tmp_path / other_format
        shardckpt.convert(first, rounded, dtype=dtype, overwrite=True)
        for pair in ((first, rounded), (rounded, first)):
            found = shardckpt.diff(*pair, keys="model")
            assert found.tensors["model.a"].elements is None
            assert not found.dtypes
            found = shardckpt.diff(*pair, keys="model", rtol=torch.finfo(dtype).eps, atol=1e-7)
            assert found.equal
            assert set(found.dtypes["model.a"]) == {torch.float32, dtype}
            assert list(found.dtypes) == ["model.a", "model.tied"]
            found = shardckpt.diff(*pair, keys="model", rtol=torch.finfo(dtype).eps / 8)
            assert found.tensors["model.a"].elements > 0
            assert found.tensors["model.a"].largest > 0
            assert "model.tied" in found.dtypes  # zeros


def test_a_tolerance_of_0_compares_across_dtypes_exactly(tmp_path):
    w = torch.tensor([0.5, -1.25, math.nan, math.inf, -0.0])
    assert compared(w, w.double(), tmp_path, atol=0).equal
    assert not compared(w, w.double(), tmp_path).equal
    other = w.double()
    other[0] += 2**-50
    found = compared(w, other, tmp_path, rtol=0)
    assert found.tensors["w"].elements == 1
    assert found.tensors["w"].dtypes == (torch.float32, torch.float64)


INTEGERS = [2**63 - 1, 2**63 - 2, 2**53 + 1, 7]


@pytest.mark.parametrize(
    ("a", "b", "elements"),
    [
        (torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 3.5]), 1),
        (torch.tensor([1, 0, 1]), torch.tensor([True, False, False]), 1),
        (torch.tensor([True, False]), torch.tensor([1.0, 0.0]), 0),
        (torch.tensor(INTEGERS), torch.tensor(INTEGERS, dtype=torch.uint64), 0),
        (torch.tensor([-1, 5]), torch.tensor([2**64 - 1, 5], dtype=torch.uint64), 1),
        (torch.tensor([-1, 5], dtype=torch.int8), torch.tensor([255, 5], dtype=torch.uint8), 1),
        (torch.tensor([1.5, 2]), torch.tensor([1.5 + 0j, 2 + 1j]), 1),
        (torch.tensor([1 + 1j, 2]), torch.tensor([1 + 1j, 2], dtype=torch.complex128), 0),
        (torch.tensor([1.5, 448.0]), torch.tensor([1.5, 448.0]).to(torch.float8_e4m3fn), 0),
        (torch.tensor([1.5, 3.14]), torch.tensor([1.5, 3.14]).to(torch.float8_e5m2), 1),
        (torch.tensor([math.nan, 1]), torch.tensor([math.nan, 1]).to(torch.float8_e5m2), 0),
        (torch.tensor([math.nan, 1]), torch.tensor([0, 1]), 1),
        (torch.tensor(2.0), torch.tensor(2), 0),
        (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), 0),
    ],
)
def test_dtypes_of_all_kinds_are_compared(a, b, elements, tmp_path):
    for pair in ((a, b), (b, a)):
        assert not compared(*pair, tmp_path).equal
        found = compared(*pair, tmp_path, atol=0)
        assert found.equal == (elements == 0)
        if elements:
            assert found.tensors["w"].elements == elements
        else:
            assert found.dtypes == {"w": (pair[0].dtype, pair[1].dtype)}


def test_dtypes_without_arithmetic_and_other_shapes_always_differ(tmp_path):
    for dtype in (DTYPES[name] for name in ("BITS8", "F4X2") if name in DTYPES):
        packed = torch.zeros(4, dtype=torch.uint8).view(dtype)
        found = compared(packed, torch.zeros(4), tmp_path, rtol=1, atol=1)
        assert found.tensors["w"].elements is None
    found = compared(torch.zeros(4), torch.zeros(5).half(), tmp_path, rtol=1, atol=1)
    assert found.tensors["w"].shapes == ((4,), (5,))


def test_a_list_and_a_tuple_of_equal_items_are_equal(tmp_path):
    """Formats such as DCP do not tell them apart."""
    for name, items in (("a", [1, 2]), ("b", (1, 2))):
        shardckpt.save({"items": items, "zero": torch.tensor([0.0])}, tmp_path / name)
    assert shardckpt.diff(tmp_path / "a", tmp_path / "b").equal
    shardckpt.save({"items": [1, 2], "zero": torch.tensor([-0.0])}, tmp_path / "c")
    assert shardckpt.diff(tmp_path / "a", tmp_path / "c").equal
