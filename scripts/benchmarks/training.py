"""Cases that save in the background: how long training is blocked, and how much it is slowed."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks import raw
from benchmarks.bench import Bench, peers, remove, slug
from benchmarks.peers import Peer, Pending, Shardckpt
from benchmarks.ranks import Place
from benchmarks.rounds import Contestant, Results, compete
from benchmarks.states import Check, local_bytes, state_of, trained
from benchmarks.table import Row, Target, row

_NO_SAVE = "no save"
_STEPS = 3
_TOKENS = 16


def _in_background(place: Place, state: dict[str, Any]) -> list[Peer]:
    return [
        peer
        for peer in peers(place, state, in_background=True)
        if getattr(peer, "async_save", None)
    ]


def _blocked_job(
    place: Place, bench: Bench, rounds: int, warm_up: int, turn: int, sharded: bool = True
) -> Results:
    """The call, and wait_staged() right after it; the rest of the save is not measured."""
    state = state_of(*trained(bench.size_bytes, sharded=sharded))
    contestants, found = [], _in_background(place, state)
    for peer in found:
        path, pending = f"{bench.root}/{slug(peer.name)}", list[Pending]()

        def run(peer: Peer = peer, path: str = path, pending: Any = pending) -> dict[str, float]:
            start = time.perf_counter()
            pending.append(peer.async_save(path))
            call = time.perf_counter() - start
            pending[0].wait_staged()
            return {"call_seconds": call}

        contestants.append(
            Contestant(
                name=peer.name,
                before=lambda path=path: remove(place, path),
                run=run,
                after=lambda pending=pending: pending.pop().result(),
            )
        )
    size = local_bytes(state) if sharded else local_bytes(state) // place.world_size
    source, held = raw.Memory(size), list[raw.Memory]()

    def copy() -> None:
        if not held:
            held.append(raw.Memory(size, touched=False))
        raw.copy(size, source, held[0], threads=1)

    contestants.append(Contestant(name="raw, memcpy", run=copy))
    results = compete(place, contestants, rounds=rounds, warm_up=warm_up, turn=turn)
    for peer in found:
        peer.close()
    return results


def blocked(bench: Bench) -> list[Row]:
    """async_save on 4 ranks: the call, and blocked until staged, first in a process and later."""
    first = Results()
    for turn in (0, 2, 4):  # who comes first takes memory that others find in the machine
        first.extend(bench.run("async, first", 4, _blocked_job, 1, 0, turn))
    bench.found["async, first"] = first.as_json()
    steady = bench.run("async, steady", 4, _blocked_job, bench.rounds, 1, 0)
    returns = Target(against="limit", factor=5)
    goals = (Target(against="DCP", factor=1.3), Target(against="raw", factor=1.15))
    return [
        row("async_save: the call, first", "ms", first, returns, of="call_seconds", raw=False),
        row("async_save: the call, steady", "ms", steady, returns, of="call_seconds", raw=False),
        row("async_save: blocked until staged, first", "s", first, *goals),
        row("async_save: blocked until staged, steady", "s", steady, *goals),
    ]


def blocked_replicated(bench: Bench) -> list[Row]:
    """async_save of a replicated state on 4 ranks: blocked until staged. Raw copies a quarter."""
    steady = bench.run("async, replicated", 4, _blocked_job, bench.rounds, 1, 0, False)
    goals = (Target(against="DCP", factor=4), Target(against="raw", factor=1.5))
    return [row("async_save, replicated state: blocked until staged", "s", steady, *goals)]


class _Loop:
    """Training under FSDP2; `run` takes some steps, with a save that begins before the first."""

    def __init__(self, bench: Bench) -> None:
        self.model, self.optimizer = trained(bench.size_bytes, sharded=True)
        self.tokens = torch.randint(
            self.model.vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0)
        )

    def run(self, peer: Peer | None, path: str) -> None:
        """Return once the steps are done and the save is durable."""
        pending = peer.async_save(path) if peer else None
        for step in range(_STEPS):
            logits = self.model(self.tokens)
            loss = torch.nn.functional.cross_entropy(logits[0], self.tokens[0])
            loss.backward()
            if pending and peer and step == 0 and not peer.steps_wait:
                pending.wait_staged()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if pending:
            pending.result()


def _train_job(place: Place, bench: Bench) -> Results:
    loop = _Loop(bench)
    state = state_of(loop.model, loop.optimizer)  # its tensors are those that the steps change
    found: list[Peer] = []
    for peer in _in_background(place, state):
        # Whole objects, so that the step knows of the save.
        own = {"model": loop.model, "optimizer": loop.optimizer}
        found.append(Shardckpt(place, own) if isinstance(peer, Shardckpt) else peer)

    check: list[Check] = []

    def before(path: str) -> None:
        remove(place, path)
        check[:] = [Check(state)]

    def after(peer: Peer, path: str) -> None:
        """Check that the checkpoint has the state of the call, whatever the steps did since."""
        check[0].wipe(state)
        peer.load(path)
        check[0].verify(state)

    contestants = [Contestant(name=_NO_SAVE, run=lambda: loop.run(None, ""))]
    for peer in found:
        path = f"{bench.root}/{slug(peer.name)}"
        contestants.append(
            Contestant(
                name=peer.name,
                before=lambda path=path: before(path),
                run=lambda peer=peer, path=path: loop.run(peer, path),
                after=lambda peer=peer, path=path: after(peer, path),
            )
        )
    results = compete(place, contestants, rounds=bench.rounds)
    for peer in found:
        peer.close()
    return results


def train(bench: Bench) -> list[Row]:
    """Training on 4 ranks with a save under way: the time that each save costs the steps."""
    results = bench.run("train", 4, _train_job)
    plain = [sample.seconds for sample in results.samples[_NO_SAVE]]
    lost = {
        name: max(  # a loss of less than a millisecond can't be measured
            1e-3,
            statistics.median(
                sample.seconds - base for sample, base in zip(samples, plain, strict=True)
            ),
        )
        for name, samples in results.samples.items()
        if name != _NO_SAVE
    }
    step = statistics.median(plain) / _STEPS
    return [
        Row(
            title=f"training: time lost for each save (a step takes {step:.2f} s)",
            unit="s",
            figures=lost,
            targets=[Target(against="DCP", factor=5)],
        )
    ]
