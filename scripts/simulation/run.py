"""Saves and a load of a World: rank 0 and an ordinary rank, phase by phase."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from shardckpt.format import divided_manifest
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.format.divided_manifest import check_manifest_parts
from shardckpt.format.entries import Manifest
from shardckpt.format.manifest import from_bytes
from shardckpt.format.number_lists import Ints
from shardckpt.format.validation import joined_ranges
from shardckpt.io.gc_pause import collector_paused
from shardckpt.loading.agreement import open_manifest
from shardckpt.plan.local_plan import ChunkTable, LocalPlan, pack_columns, unpack_columns
from shardckpt.plan.read_plan import plan_reads
from shardckpt.plan.save_plan import RankWrites
from shardckpt.plan.shard_layout import layout_digests, shard_name
from shardckpt.saving.agreement import SaveTarget
from shardckpt.saving.pipeline import run_save
from shardckpt.saving.rank_writer import ShardFile, ShardResult
from shardckpt.saving.replicas import replica_digests
from shardckpt.state.matching import match_state
from shardckpt.state.saved_tree import SavedState
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.local import LocalStorage
from simulation.ranks import Nowhere, Phase, Recorder
from simulation.world import World, as_rank, check, loading_state, plan_of

HEADER_BYTES = 4096


@dataclass
class Result:
    """The costs of one job."""

    world: World
    saves: dict[str, dict[str, list[Phase]]] = field(default_factory=dict)
    loads: dict[str, dict[str, float]] = field(default_factory=dict)
    manifest_bytes: int = 0
    chunks: int = 0
    peak_bytes: int = 0


class Others:
    """The messages of ranks 1, 2, ... in a save, in the order of its phases."""

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
            specs = (*plan.common, *plan.rank_only)
            chunks = ChunkTable(tensor=plan.chunks.tensor[writes.row], boxes=writes.boxes)
            bounds = [0, *itertools.accumulate(count for _, count in writes.files)]
            layouts = layout_digests(specs, chunks, bounds)
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
                        layout=layouts[len(files)],
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
    result.chunks = sum(len(plan.chunks) for plan in others.plans) // world.replicas
    result.loads = loads(world, storage.kept)
    result.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return result


def loads(world: World, manifest: bytes) -> dict[str, dict[str, float]]:
    """Plan a load by three quarters as many ranks: seconds by phase, and bytes of memory.

    Rank 0 and an ordinary rank are processes of their own, so that their memory is their own.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, MANIFEST_NAME).write_bytes(manifest)
        found = {}
        for who in ("rank 0", "ordinary rank"):
            size = f"{world.ranks}x{world.tensors}"
            command = [sys.executable, "-m", "simulation", "--layout", world.layout, size]
            done = subprocess.run(
                [*command, "--load", folder, who], check=True, stdout=subprocess.PIPE, text=True
            )
            found[who] = json.loads(done.stdout)
        return found


def load(world: World, folder: str, who: str) -> dict[str, float]:
    """Plan the load of one rank, in this process."""
    ranks = max(1, world.ranks * 3 // 4)
    rank = 0 if who == "rank 0" else ranks // 2
    as_rank(rank, ranks)
    state = loading_state(ranks, shape=world.shape, tensors=world.tensors)
    storage = LocalStorage()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of memory so far
    memory, seconds = _memory("VmRSS"), {}
    since = time.process_time()

    def phase(name: str) -> None:
        nonlocal since
        now = time.process_time()
        seconds[name], since = now - since, now

    with collector_paused():
        files, manifest = open_manifest(storage, folder, rank=rank, world_size=ranks)
        phase("manifest")
        matched = match_state(state, SavedState(manifest), rank=rank, world_size=ranks, cast=False)
        phase("match")
        plan_reads(matched.reads)
        phase("reads")
    assert matched.strict_mismatches.error(folder) is None
    seconds["memory_bytes"] = _memory("VmHWM") - memory
    seconds["ranges_bytes"] = 0
    seconds["compare"] = 0.0
    if who == "rank 0" and manifest.part is not None:
        packed = [
            manifest.part.ranges,
            *_parts_of_others(from_bytes(files.manifest(), path=folder), ranks),
        ]
        packed = [pack_columns(ranges) for ranges in packed]
        seconds["ranges_bytes"] = sum(map(len, packed[1:]))
        since = time.process_time()
        parts = [unpack_columns(ranges) for ranges in packed]
        check_manifest_parts(parts, len(manifest.shards), files.manifest, path=folder)
        phase("compare")
    return seconds


def _parts_of_others(manifest: Manifest, ranks: int) -> Iterator[Ints]:
    """The parts that ranks 1, 2, ... check, made from the complete manifest."""
    for rank in range(1, ranks):
        if names := divided_manifest._own(list(manifest.tensors), rank, ranks):
            ranges = np.concatenate([manifest.tensors[name].chunks[:, :3] for name in names])
            yield joined_ranges(ranges, len(manifest.shards))


def _memory(field: str) -> int:
    """A field of the memory of this process, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
