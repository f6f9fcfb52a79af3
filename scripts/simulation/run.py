"""Saves and a load of a World: rank 0 and an ordinary rank, phase by phase."""

from __future__ import annotations

import resource
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import msgspec
import numpy as np

from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.loading.agreement import open_manifest
from shardckpt.plan.local_plan import LocalPlan
from shardckpt.plan.read_plan import plan_reads
from shardckpt.plan.save_plan import RankWrites
from shardckpt.plan.shard_layout import shard_name
from shardckpt.saving.agreement import SaveTarget
from shardckpt.saving.pipeline import run_save
from shardckpt.saving.rank_writer import ShardFile, ShardResult
from shardckpt.saving.replicas import replica_digests
from shardckpt.state.matching import match_state
from shardckpt.state.saved_tree import SavedState
from simulation.ranks import Nowhere, Phase, Recorder
from simulation.world import World, as_rank, check, loading_state, plan_of

HEADER_BYTES = 4096


@dataclass
class Result:
    """What one world costs."""

    world: World
    saves: dict[str, dict[str, list[Phase]]] = field(default_factory=dict)
    load_s: dict[str, float] = field(default_factory=dict)
    manifest_bytes: int = 0
    chunks: int = 0
    peak_bytes: int = 0


class Others:
    """What ranks 1, 2, ... send in a save, in the order of its phases."""

    def __init__(self, world: World, first: LocalPlan) -> None:
        self.world = world
        self.first = first
        self.plans = world.plans(first)
        self.digests = [plan.digests() for plan in self.plans]
        self.known = ""
        self.results: list[bytes] = []

    def payloads(self, phase: str) -> list[bytes]:
        """The payloads of a phase."""
        encode = msgspec.msgpack.encode
        if phase == "plan":
            return [encode((*digests, self.known)) for digests in self.digests[1:]]
        if phase == "divide":
            return [plan.pack(complete=False) for plan in self.plans[1:]]
        return [b""] * (self.world.ranks - 1) if phase == "join" else self.results

    def write(self, shares: list[bytes]) -> None:
        """Have all ranks write what rank 0 tells them to. All chunks are alike, replicas too."""
        lead = RankWrites.of(self.plans[0], shares[0])
        replica = replica_digests(self.first, lead, everything=False)[:8]
        for rank, (plan, share) in enumerate(zip(self.plans, shares, strict=True)):
            writes = RankWrites.of(plan, share)
            ends = np.cumsum(np.append(0, writes.boxes[:, 1].prod(axis=1) * 4))
            files, done = [], 0
            for file_group, count in writes.files:
                begin, done = done, done + count
                size = HEADER_BYTES + int(ends[done] - ends[begin])
                files.append(
                    ShardFile(
                        name=shard_name(
                            rank=rank, world_size=self.world.ranks, file_group=file_group
                        ),
                        chunks=count,
                        header_bytes=HEADER_BYTES,
                        size_bytes=size,
                        digests=np.random.default_rng(rank).bytes(8 * -(-size // BLOCK_BYTES)),
                    )
                )
            result = ShardResult(files=tuple(files), replicas=replica * len(writes.compare))
            if rank:
                self.results.append(msgspec.msgpack.encode(result))


class Shares(Recorder):
    """Rank 0, which lets the others write once it has answered them all."""

    made_up: Others

    def scatter(self, payloads: object, *, phase: str) -> bytes:
        """See Coordinator.scatter."""
        answer = super().scatter(payloads, phase=phase)  # type: ignore[arg-type]
        if phase == "divide":
            self.made_up.write([msgspec.msgpack.decode(own)[0] for own in payloads])  # type: ignore[attr-defined]
        self._since = time.process_time()
        return answer


def simulate(world: World) -> Result:
    """Save twice and load, on rank 0 and on a rank in the middle."""
    result = Result(world)
    middle = world.ranks // 2
    first = plan_of(world, 0)
    others = Others(world, first)
    check(world, others.plans, middle)
    check(world, others.plans, world.ranks - 1)
    storage = Nowhere()
    target = SaveTarget("nowhere", storage, overwrite=True)
    for name in ("first save", "repeated save"):
        lead = Shares(0, world.ranks, others=others.payloads, watched=middle)
        lead.made_up = others
        as_rank(0, world.ranks)
        run_save(lambda: first, target, coordinator=lead, base=nullcontext(), check_replicas=False)
        follow = Recorder(middle, world.ranks, answers=lead.answered)
        own = plan_of(world, middle)
        run_save(
            lambda plan=own: plan,
            target,
            coordinator=follow,
            base=nullcontext(),
            check_replicas=False,
        )
        others.known = msgspec.msgpack.decode(msgspec.msgpack.decode(lead.answered["plan"])[0])[1]
        result.saves[name] = {"rank 0": lead.phases, "ordinary rank": follow.phases}
    result.manifest_bytes = len(storage.kept)
    result.load_s = load(world, storage, result)
    result.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return result


def load(world: World, storage: Nowhere, result: Result) -> dict[str, float]:
    """Plan a load by three quarters as many ranks; seconds by phase, on any of them."""
    ranks = max(1, world.ranks * 3 // 4)
    seconds = {}
    since = time.process_time()
    _, manifest = open_manifest(storage, "nowhere")
    seconds["manifest"] = time.process_time() - since
    result.chunks = sum(len(entry.chunks) for entry in manifest.tensors.values())
    as_rank(ranks // 2, ranks)
    state = loading_state(ranks, shape=world.shape, tensors=world.tensors)
    since = time.process_time()
    saved = SavedState(manifest)
    matched = match_state(state, saved, rank=ranks // 2, world_size=ranks, cast=False)
    assert matched.strict_mismatches.error("nowhere") is None
    seconds["match"] = time.process_time() - since
    since = time.process_time()
    plan_reads(matched.reads)
    seconds["reads"] = time.process_time() - since
    return seconds
