"""The entries of a manifest."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shardckpt.format.entries import FORMAT_VERSION, Manifest, TensorEntry


@pytest.mark.parametrize(
    ("dtype", "shape", "size_bytes"),
    [("F32", (3, 4), 48), ("BF16", (), 2), ("U8", (0, 9), 0), ("C128", (2,), 32)],
)
def test_the_bytes_of_a_tensor_follow_from_dtype_and_shape(dtype, shape, size_bytes):
    chunks = np.empty((0, 3 + 2 * len(shape)), np.int64)
    assert TensorEntry(dtype=dtype, shape=shape, chunks=chunks).size_bytes == size_bytes


def test_a_manifest_can_not_be_changed_and_shares_no_notes():
    facts = {"checkpoint_id": "0" * 32, "created": "", "library": "", "world_size": 1}
    one, other = (Manifest(**facts, shards=(), tensors={}, state=None) for _ in range(2))
    assert one.format_version == FORMAT_VERSION
    assert one.per_rank == ()
    assert one.notes is not other.notes
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.world_size = 2
