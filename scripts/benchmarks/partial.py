"""Cases that touch little: 8 rows of a weight, the first tensor of a state on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from benchmarks.bench import Bench, page_cache, shards
from benchmarks.files import bytes_read
from benchmarks.peers import Dcp, Safetensors, TorchSave
from benchmarks.ranks import Place
from benchmarks.rounds import Contestant, Results, compete
from benchmarks.table import Row, Target, row
from shardckpt.format.digests import BLOCK_BYTES


def _disk_job(place: Place, bench: Bench) -> Results:
    import shardckpt

    name = "embedding.weight"

    def own() -> None:
        shardckpt.load_state(bench.checkpoint("shardckpt"), device_map="disk")["model"][name][
            0
        ].sum()

    def torch_file() -> None:
        torch.load(f"{bench.whole}/state.pt", mmap=True, weights_only=True)["model"][name][0].sum()

    return compete(
        place,
        [
            Contestant(
                name=kind,
                before=lambda path=path: page_cache(place, path, cold=True),
                run=run,
            )
            for kind, path, run in (
                ("shardckpt", bench.checkpoint("shardckpt"), own),
                ("torch.save", bench.whole, torch_file),
            )
        ],
        rounds=bench.rounds,
    )


def disk(bench: Bench) -> list[Row]:
    """A state that stays on the disk, cold, to its first tensor."""
    bench.save_once()
    results = bench.run("disk", 1, _disk_job)
    limit = Target(against="limit", factor=50)
    return [row('device_map="disk" to the first tensor, cold', "ms", results, limit)]


def _slice_job(place: Place, bench: Bench) -> Results:
    import torch.distributed.checkpoint as dcp
    from safetensors import safe_open

    import shardckpt

    whole = torch.load(f"{bench.whole}/state.pt", weights_only=True)
    name = "embedding.weight"
    expected = whole["model"][name][:8].clone()
    shape = whole["model"][name].shape
    held: list[torch.Tensor] = []

    def own() -> torch.Tensor:
        with shardckpt.open_checkpoint(bench.checkpoint("shardckpt")) as checkpoint:
            return checkpoint[f"model.{name}"][0:8]

    def by_dcp() -> torch.Tensor:
        state = {"model": {name: torch.empty(shape)}}
        dcp.load(state, checkpoint_id=bench.checkpoint("DCP"))
        return state["model"][name][:8]

    def by_safetensors() -> torch.Tensor:
        with safe_open(f"{bench.whole}/state.safetensors", "pt") as file:
            return file.get_slice(f"model.{name}")[0:8]

    def by_torch() -> torch.Tensor:
        state = torch.load(f"{bench.whole}/state.pt", mmap=True, weights_only=True)
        return state["model"][name][:8].clone()

    def by_hand() -> torch.Tensor:
        into = torch.empty_like(expected)
        with open(shards(bench)[0], "rb", buffering=0) as file:
            file.readinto(into.numpy().data.cast("B"))
        return expected

    def measured(function: Callable[[], torch.Tensor]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            before = bytes_read()
            held.append(function())
            return {"bytes_read": bytes_read() - before}

        return run

    def after() -> None:
        assert torch.equal(held.pop(), expected)

    ways = {
        "shardckpt": own,
        Dcp.name: by_dcp,
        Safetensors.name: by_safetensors,
        TorchSave.name: by_torch,
        "raw, pread": by_hand,
    }
    contestants = [
        Contestant(name=key, run=measured(way), after=after) for key, way in ways.items()
    ]
    return compete(place, contestants, rounds=max(bench.rounds, 5))


def slices(bench: Bench) -> list[Row]:
    """8 rows of one weight: time, and bytes asked for in read calls (mapped pages are not)."""
    bench.save_once()
    results = bench.run("slice", 1, _slice_job)
    manifest = os.path.getsize(f"{bench.checkpoint('shardckpt')}/manifest.json")
    allowed = results.median("raw, pread", "bytes_read") + BLOCK_BYTES + manifest
    within = Target(against="limit", factor=allowed * 1e-3)
    return [
        row("8 rows of one weight, warm", "ms", results, Target(against="DCP", factor=20)),
        row("the bytes it reads", "KB", results, within, of="bytes_read"),
    ]
