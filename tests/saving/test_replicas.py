"""The digests by which ranks compare replicas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardckpt.plan.local_plan import local_plan
from shardckpt.plan.save_plan import RankWrites, global_plan
from shardckpt.saving.replicas import COMPARED_BYTES, replica_digests
from shardckpt.state.flatten import flatten


def digests(tensors, **options):
    """The digests of the chunks that both of two ranks hold, by name."""
    plan = local_plan(flatten(tensors, rank=0), world_size=2)
    writes = RankWrites.of(plan, global_plan([plan, plan]).shares[0])
    found = np.frombuffer(replica_digests(plan, writes, **options), dtype="<u8").tolist()
    rows = plan.chunks.tensor[writes.compare].tolist()
    return {plan.common[row].name: digest for row, digest in zip(rows, found, strict=True)}


def test_equal_elements_have_equal_digests_whatever_their_layout():
    values = torch.arange(12.0).reshape(3, 4)
    one = digests({"w": values}, everything=True)
    other = digests({"w": values.t().contiguous().t()}, everything=True)
    assert one == other
    assert one["w"] != digests({"w": values + 1}, everything=True)["w"]


def test_large_chunks_are_compared_only_on_request():
    small, large = torch.zeros(COMPARED_BYTES // 4), torch.zeros(COMPARED_BYTES // 4 + 1)
    found = digests({"small": small, "large": large}, everything=False)
    assert found["small"] != 0
    assert found["large"] == 0
    assert digests({"large": large}, everything=True)["large"] != 0


@pytest.mark.parametrize("shape", [(40_000,), (2, 40_000), (40_000, 2), (1, 1, 70_000)])
def test_a_sample_is_the_beginning_of_a_large_chunk(shape):
    large = torch.zeros(shape)
    sample = digests({"w": large}, everything=False, sampled=True)["w"]
    assert sample != 0
    large.view(-1)[-1] = 1
    assert digests({"w": large}, everything=False, sampled=True)["w"] == sample
    large.view(-1)[0] = 1
    assert digests({"w": large}, everything=False, sampled=True)["w"] != sample


def test_a_chunk_without_elements_has_no_digest():
    assert digests({"w": torch.empty(0, 3)}, everything=True) == {"w": 0}
