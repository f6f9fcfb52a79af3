"""The names of dtypes in the format, without torch."""

from __future__ import annotations

import pytest

from shardckpt import errors
from shardckpt.format.dtype_names import (
    check_supported,
    is_supported,
    itemsize,
    plain_form,
    shard_form,
)


@pytest.mark.parametrize(
    ("name", "form", "size_bytes"),
    [
        ("F32", ("F32", (2, 3)), 4),
        ("C128", ("F64", (2, 3, 2)), 16),
        ("C32", ("F16", (2, 3, 2)), 4),
        ("BITS16", ("U16", (2, 3)), 2),
        ("INT4", ("U8", (2, 3)), 1),
    ],
)
def test_a_dtype_has_a_form_and_a_size_in_its_shard(name, form, size_bytes):
    assert shard_form(name, (2, 3)) == form
    assert itemsize(name) == size_bytes
    assert is_supported(name)


def test_safetensors_files_hold_only_dtypes_of_safetensors():
    assert plain_form("F32", [2, 3], tensor="w") == ("F32", (2, 3))
    with pytest.raises(errors.UnsupportedLeafError, match="complex128"):
        plain_form("C128", [2], tensor="w")


def test_a_dtype_that_the_installed_torch_lacks_is_an_error(monkeypatch):
    monkeypatch.setattr("shardckpt.format.dtype_names.is_supported", lambda name: False)
    with pytest.raises(errors.CheckpointError, match="bfloat16"):
        check_supported("BF16", tensor="w", path="c")
    check_supported("unknown", tensor="w", path="c")  # other checks refuse unknown names
