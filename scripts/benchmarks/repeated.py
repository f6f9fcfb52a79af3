"""The case of a state that is saved again and again while most of it is frozen."""

from __future__ import annotations

from benchmarks.bench import Bench, peers, remove, slug
from benchmarks.files import bytes_written
from benchmarks.peers import Peer, Shardckpt
from benchmarks.ranks import Place
from benchmarks.rounds import Contestant, Results, compete
from benchmarks.states import Check, state_of, step, with_frozen_base
from benchmarks.table import Row, Target, row


class _Based(Shardckpt):
    """shardckpt, told of its save before."""

    base: str | None = None

    def save(self, path: str) -> None:
        """See Peer."""
        import shardckpt

        shardckpt.save(self.state, path, base=self.base)
        self.base = path


def _frozen_job(place: Place, bench: Bench) -> Results:
    model, optimizer = with_frozen_base(bench.size_bytes)
    state = state_of(model, optimizer)
    based = _Based(place, {"model": model, "optimizer": optimizer})  # it asks what is frozen
    contestants = []
    for peer in [based, *(peer for peer in peers(place, state) if peer.name != based.name)]:
        turns = [f"{bench.root}/{slug(peer.name)}-{turn}" for turn in (0, 1)]

        def before(turns: list[str] = turns) -> None:
            step(optimizer)
            turns.reverse()  # the checkpoint before last makes room
            remove(place, turns[0])

        def run(peer: Peer = peer, turns: list[str] = turns) -> dict[str, float]:
            count = bytes_written()
            peer.save(turns[0])
            return {"bytes_written": bytes_written() - count}

        def after(peer: Peer = peer, turns: list[str] = turns) -> None:
            check = Check(state)
            check.wipe(state)
            peer.load(turns[0])
            check.verify(state)

        contestants.append(Contestant(name=peer.name, before=before, run=run, after=after))
    return compete(place, contestants, rounds=bench.rounds)


def frozen(bench: Bench) -> list[Row]:
    """Repeated save on 4 ranks of a state of which 90% is frozen."""
    results = bench.run("frozen", 4, _frozen_job)
    fewer = Target(against="DCP", factor=5)
    return [
        row("repeated save, 90% frozen: bytes written", "MB", results, fewer, of="bytes_written"),
        row("repeated save, 90% frozen", "s", results),
    ]
