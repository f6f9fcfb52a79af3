"""The manifest of a save, and the facts that every rank reports."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shardckpt.coordination.exchange import attempt
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import ReplicaMismatchError
from shardckpt.format.manifest import encode_tensors, from_bytes
from shardckpt.plan.plan_cache import KnownPlan
from shardckpt.plan.save_plan import global_plan
from shardckpt.plan.shard_layout import layout_digests
from shardckpt.reports import Stopwatch
from shardckpt.saving.agreement import Agreement
from shardckpt.saving.commit import commit, commit_manifest, file_table
from shardckpt.saving.rank_writer import ShardFile, ShardResult
from tests.plan.plans import replicated


class Transaction:
    """A transaction that keeps the manifest."""

    manifest = b""
    path = "p"

    def commit(self, manifest):
        self.manifest = manifest


def a_file(rank, size_bytes, *, ranks=2, linked_bytes=0, chunks=1):
    return ShardFile(
        name=f"shard-{rank:05}-of-{ranks:05}.safetensors",
        chunks=chunks,
        header_bytes=4096,
        size_bytes=size_bytes,
        layout=7,
        digests=np.array([rank + 5], "<u8").tobytes(),
        linked_bytes=linked_bytes,
    )


def committed(results, *, tree=b"{}", **options):
    transaction = Transaction()
    options = {"checkpoint_id": "1" * 32, "tensors": encode_tensors(()), **options}
    facts = commit_manifest(transaction, results=results, tree=tree, **options)
    return facts, transaction.manifest, from_bytes(transaction.manifest, path="p")


def test_the_manifest_lists_the_files_of_all_ranks_in_order():
    results = [
        ShardResult(files=(a_file(0, 5000),)),
        ShardResult(files=(a_file(1, 6000, linked_bytes=5500),), problems=("old",)),
    ]
    facts, text, manifest = committed(results, tree=b'{"step":3}')
    assert [(s.name[:11], s.size_bytes) for s in manifest.shards] == [
        ("shard-00000", 5000),
        ("shard-00001", 6000),
    ]
    assert [s.digests.tolist() for s in manifest.shards] == [[5], [6]]
    assert (manifest.world_size, manifest.state, manifest.per_rank) == (2, {"step": 3}, ())
    report = facts.report()
    assert report["bytes_by_rank"] == (5000, 6000)
    assert report["linked_by_rank"] == (0, 5500)
    assert report["manifest_bytes"] == len(text)
    assert report["base_problems"] == ("rank 1: old",)
    assert results[1].linked_bytes == 5500


def test_values_of_ranks_are_kept_if_any_rank_has_them():
    results = [ShardResult(files=()), ShardResult(files=(), per_rank_trees=b"[7]")]
    results[0].per_rank_trees = b"[6]"
    assert committed(results)[2].per_rank == ([6], [7])


def test_a_rewrite_keeps_world_size_values_and_notes_of_the_original():
    original = committed([ShardResult(files=())])[2]
    original = dataclasses.replace(original, world_size=7, per_rank=([1],) * 7, notes={"a": "b"})
    manifest = committed([ShardResult(files=())], saved_by=original)[2]
    assert (manifest.world_size, len(manifest.per_rank), manifest.notes) == (7, 7, {"a": "b"})


def test_a_problem_of_many_ranks_is_reported_once_and_at_most_eight_are():
    results = [ShardResult(files=(), problems=("shared", f"of {rank}")) for rank in range(10)]
    problems = committed(results)[0].base_problems
    assert problems[0] == "rank 0 and 9 more: shared"
    assert problems[1] == "rank 0: of 0"
    assert len(problems) == 8


def test_the_table_of_files_has_chunks_and_header_of_each_file():
    results = [ShardResult(files=(a_file(0, 1, chunks=3), a_file(0, 1))), ShardResult(files=())]
    assert file_table(results).tolist() == [[0, 3, 4096, 7], [0, 1, 4096, 7]]


def agreement(plan, transaction):
    return Agreement(
        local=None,
        writes=None,
        transaction=transaction,
        checkpoint_id="2" * 32,
        merged=False,
        plan=KnownPlan(plan),
        tree=b"{}",
    )


def test_the_error_of_the_writing_ends_the_commit():
    transaction = Transaction()
    written = attempt(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        agreed = agreement(global_plan(replicated([], 1)), transaction)
        commit(SingleCoordinator(), written, agreed, Stopwatch())
    assert transaction.manifest == b""


class TwoRanks(SingleCoordinator):
    """Rank 0 of two ranks; the payload of the other is given."""

    world_size = 2

    def __init__(self, other):
        self.other = other

    def gather(self, payload, *, phase):
        return [payload, payload.replace(*self.other)]


def test_replicas_that_differ_end_the_commit_before_the_manifest():
    transaction, plan = Transaction(), global_plan(replicated([8], 2))
    result = ShardResult(files=(), replicas=np.array([77], "<u8").tobytes())
    ranks = TwoRanks((result.replicas, np.array([78], "<u8").tobytes()))
    with pytest.raises(ReplicaMismatchError) as caught:
        commit(ranks, attempt(lambda: result), agreement(plan, transaction), Stopwatch())
    assert caught.value.tensor == "t0"
    assert transaction.manifest == b""


def test_the_facts_and_the_work_of_a_commit():
    transaction, work = Transaction(), Stopwatch()
    plan = global_plan(replicated([], 1))
    file = a_file(0, 4096, ranks=1, chunks=0)
    (file.layout,) = layout_digests(plan.specs, plan.chunks, plan.bounds.tolist())
    result = ShardResult(files=(file,), seconds={"write": 1.5})
    facts, profile = commit(
        SingleCoordinator(), attempt(lambda: result), agreement(plan, transaction), work
    )
    assert (
        from_bytes(transaction.manifest, path="p").checkpoint_id == facts.checkpoint_id == "2" * 32
    )
    assert "commit" in profile[0]
