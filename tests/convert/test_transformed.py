"""Sources with transformed tensors, and with another dtype."""

from __future__ import annotations

import pytest
import torch

from shardckpt import errors
from shardckpt.convert.sources import foreign
from shardckpt.convert.transformed import Cast, Transformed, float_dtype
from shardckpt.transforms import Pad, Transpose

WEIGHT = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_is_named_or_given(dtype):
    assert float_dtype(dtype) is torch.bfloat16


def test_other_dtypes_are_refused():
    with pytest.raises(errors.StateError, match="float64, float32, float16, bfloat16"):
        float_dtype("int8")


def test_boxes_of_transformed_tensors_are_read():
    source = foreign("path", "a test", {"w": WEIGHT, "other": torch.ones(2)})
    with Transformed(source, [Transpose("w"), Pad("w", 5, value=9.0)]) as changed:
        assert changed.manifest.tensors["w"].shape == (5, 2)
        full = changed.read_box("w", (0, 0), (5, 2))
        assert torch.equal(full, torch.cat([WEIGHT.T, torch.full((2, 2), 9.0)]))
        assert torch.equal(changed.read_box("w", (2, 1), (2, 1)), full[2:4, 1:])
        assert torch.equal(changed.read_box("other", (0,), (2,)), torch.ones(2))


def test_only_floats_of_16_bits_and_more_get_another_dtype():
    state = {"w": WEIGHT, "n": torch.arange(3), "small": torch.ones(2).to(torch.float8_e5m2)}
    with Cast(foreign("path", "a test", state), torch.float16) as cast:
        dtypes = {name: entry.dtype for name, entry in cast.manifest.tensors.items()}
        assert dtypes == {"w": "F16", "n": "I64", "small": "F8_E5M2"}
        assert cast.read_box("w", (0, 1), (2, 2)).dtype == torch.float16
        assert cast.read_box("n", (0,), (3,)).dtype == torch.int64
