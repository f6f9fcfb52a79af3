"""Statistics of tensors."""

from __future__ import annotations

import math

import pytest
import torch

import shardckpt
from shardckpt import errors


def test_they_are_those_of_torch(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "large": torch.randn(3_000_001),  # more than one buffer
        "bf16": torch.randn(40, 3).bfloat16(),
        "int": torch.arange(-5, 5),
        "bool": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
        "fp8": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
    }
    shardckpt.save(tensors, tmp_path / "c")
    for path in (tmp_path / "c", tmp_path / "c.pth"):
        if path.suffix:
            shardckpt.convert(tmp_path / "c", path)
        found = shardckpt.stats(path)
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            one, wide = found[name], tensor.double()
            assert (one.dtype, one.shape) == (tensor.dtype, tuple(tensor.shape))
            assert one.norm == pytest.approx(float(wide.norm()))
            assert one.zeros == int((wide == 0).sum())
            assert (one.nan, one.inf) == (0, 0)
            if wide.numel():
                assert one.smallest == float(wide.min())
                assert one.largest == float(wide.max())
                assert one.mean == pytest.approx(float(wide.mean()), abs=1e-12)
            else:
                assert (one.smallest, one.largest, one.mean) == (None, None, None)


def test_nan_and_infinite_elements_are_counted_and_left_out(tmp_path):
    w = torch.tensor([3.0, -4.0, math.nan, math.inf, -math.inf, 0.0])
    shardckpt.save({"w": w, "z": torch.tensor([3 + 4j])}, tmp_path / "c")
    found = shardckpt.stats(tmp_path / "c")
    one = found["w"]
    assert (one.norm, one.smallest, one.largest) == (5.0, -4.0, 3.0)
    assert (one.nan, one.inf, one.zeros) == (1, 2, 1)
    assert (found["z"].norm, found["z"].mean) == (5.0, None)


def test_squares_may_overflow(tmp_path):
    large = torch.tensor([3e200, -4e200], dtype=torch.float64)
    shardckpt.save({"large": large, "small": 1 / large, "zero": 0 * large}, tmp_path / "c")
    norms = {name: one.norm for name, one in shardckpt.stats(tmp_path / "c").items()}
    expected = {"large": 5e200, "small": 5e-200 / 12, "zero": 0.0}
    assert norms == pytest.approx(expected, rel=1e-12, abs=0)


def test_keys_select_tensors(tmp_path):
    shardckpt.save({"a": torch.ones(1), "b": torch.ones(1), "n": 1}, tmp_path / "c")
    assert list(shardckpt.stats(tmp_path / "c", keys="b")) == ["b"]
    with pytest.raises(errors.LoadMismatchError):
        shardckpt.stats(tmp_path / "c", keys="bb")


def test_integers_are_exact(tmp_path):
    state = {
        "int64": torch.tensor([2**53 + 1, -(2**53) - 1, 2**63 - 1]),
        "uint64": torch.tensor([2**64 - 1, 2**64 - 2], dtype=torch.uint64),
    }
    shardckpt.save(state, tmp_path / "c")
    found = shardckpt.stats(tmp_path / "c")
    assert (found["int64"].smallest, found["int64"].largest) == (-(2**53) - 1, 2**63 - 1)
    assert (found["uint64"].smallest, found["uint64"].largest) == (2**64 - 2, 2**64 - 1)


def test_sums_and_absolute_values_may_overflow(tmp_path):
    large = torch.tensor([1.5e308, 1.7e308, 1.6e308], dtype=torch.float64)
    shardckpt.save({"w": large, "z": torch.complex(large, large)}, tmp_path / "c")
    found = shardckpt.stats(tmp_path / "c")
    assert found["w"].mean == pytest.approx(1.6e308)
    assert found["z"].norm == math.inf
