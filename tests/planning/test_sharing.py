"""Who reads what nobody else of the machine reads."""

from __future__ import annotations

import torch

from shardckpt.format.manifest import TensorEntry
from shardckpt.planning.chunks import LocalChunk
from shardckpt.planning.sharing import alone, share_of


def entry(number: int, rows: int = 8) -> TensorEntry:
    chunks = torch.tensor([[0, 4096 + 1000 * number, 4096 + 1000 * number + 4 * rows, 0, rows]])
    return TensorEntry(dtype="F32", shape=(rows,), chunks=chunks.numpy())


def rows(number: int, begin: int, end: int) -> tuple[TensorEntry, LocalChunk]:
    part = torch.zeros(end - begin)
    return entry(number), LocalChunk((begin,), (end - begin,), part)


def shares(*ranks, machines=None):
    machines = machines or ["host"] * len(ranks)
    return [share_of(reads, machine) for reads, machine in zip(ranks, machines, strict=True)]


HALVES = [[rows(0, 0, 4), rows(1, 0, 4)], [rows(0, 4, 8), rows(1, 4, 8)]]
WHOLE = [rows(0, 0, 8), rows(1, 0, 8)]


def test_parts_are_read_alone():
    assert alone(shares(*HALVES)) == [True, True]


def test_replicas_are_not_but_for_those_on_other_machines():
    assert alone(shares(WHOLE, WHOLE)) == [False, False]
    assert alone(shares(WHOLE, WHOLE, machines=["a", "b"])) == [True, True]
    hybrid = [HALVES[0], HALVES[1], HALVES[0], HALVES[1]]
    assert alone(shares(*hybrid)) == [False] * 4
    assert alone(shares(*hybrid, machines=["a", "a", "b", "b"])) == [True] * 4


def test_a_small_replica_beside_parts_does_no_harm():
    small = (entry(7, 1), LocalChunk((0,), (1,), torch.zeros(1)))
    assert alone(shares([*HALVES[0], small], [*HALVES[1], small])) == [True, True]


def test_stages_of_a_pipeline_read_tensors_of_their_own():
    assert alone(shares([rows(0, 0, 8)], [rows(1, 0, 8)])) == [True, True]
    assert alone(shares([rows(0, 0, 8)], [rows(1, 0, 8)], [rows(1, 0, 8)])) == [True, False, False]


def test_one_rank_and_none_that_reads():
    assert alone(shares(WHOLE)) == [True]
    assert alone(shares([])) == [True]
