"""The reads that bypass the page cache, which other ranks of the machine may share."""

from __future__ import annotations

import torch

from shardckpt.format.entries import TensorEntry
from shardckpt.plan.page_cache_policy import ALWAYS, MOSTLY, NEVER, past_cache, summarize_reads
from shardckpt.state.local_chunks import LocalChunk


def entry(number: int, rows: int = 8) -> TensorEntry:
    chunks = torch.tensor([[0, 4096 + 1000 * number, 4096 + 1000 * number + 4 * rows, 0, rows]])
    return TensorEntry(dtype="F32", shape=(rows,), chunks=chunks.numpy())


def rows(number: int, begin: int, end: int) -> tuple[TensorEntry, LocalChunk]:
    part = torch.zeros(end - begin)
    return entry(number), LocalChunk((begin,), (end - begin,), part)


def shares(*ranks, machines=None):
    machines = machines or ["host"] * len(ranks)
    return [summarize_reads(reads, machine) for reads, machine in zip(ranks, machines, strict=True)]


HALVES = [[rows(0, 0, 4), rows(1, 0, 4)], [rows(0, 4, 8), rows(1, 4, 8)]]
WHOLE = [rows(0, 0, 8), rows(1, 0, 8)]


def test_parts_of_tensors_are_mostly_a_ranks_own():
    assert past_cache(shares(*HALVES)) == [MOSTLY] * 2
    assert past_cache(shares(*HALVES, machines=["a", "b"])) == [ALWAYS] * 2


def test_replicas_are_not_but_for_those_on_other_machines():
    assert past_cache(shares(WHOLE, WHOLE)) == [NEVER] * 2
    assert past_cache(shares(WHOLE, WHOLE, machines=["a", "b"])) == [ALWAYS] * 2
    hybrid = [HALVES[0], HALVES[1], HALVES[0], HALVES[1]]
    assert past_cache(shares(*hybrid)) == [NEVER] * 4
    assert past_cache(shares(*hybrid, machines=["a", "a", "b", "b"])) == [MOSTLY] * 4


def test_a_small_replica_beside_parts_does_no_harm():
    small = (entry(7, 1), LocalChunk((0,), (1,), torch.zeros(1)))
    assert past_cache(shares([*HALVES[0], small], [*HALVES[1], small])) == [MOSTLY] * 2


def test_stages_of_a_pipeline_read_tensors_of_their_own():
    one, other = [rows(0, 0, 8)], [rows(1, 0, 8)]
    assert past_cache(shares(one, other)) == [ALWAYS] * 2
    assert past_cache(shares(one, other, other)) == [ALWAYS, NEVER, NEVER]


def test_one_rank_and_none_that_reads():
    assert past_cache(shares(WHOLE)) == past_cache(shares([])) == [ALWAYS]


def test_a_tensor_of_which_a_rank_reads_several_boxes_counts_once():
    one, _ = rows(0, 0, 8)
    boxes = [(one, LocalChunk((at,), (1,), torch.zeros(1))) for at in range(8)]
    (summary,) = shares(boxes)
    assert (summary.wanted_bytes, summary.tensor_bytes) == (32, 32)
    assert summary.tensors == shares([(one, LocalChunk((0,), (8,), torch.zeros(8)))])[0].tensors
    assert past_cache(shares(boxes, boxes)) == [NEVER] * 2
