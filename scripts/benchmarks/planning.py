"""The case of planning for very many ranks, by the code of scripts/simulate."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.table import Row, Target


def planning(bench: Bench) -> list[Row]:
    """The work of rank 0 in a first save of 1,024 ranks and 1,000 tensors (takes minutes)."""
    from simulation.dcp import simulate_dcp
    from simulation.run import simulate
    from simulation.world import World

    ranks, tensors = bench.planning
    dcp = simulate_dcp(World(ranks=ranks, tensors=tensors))
    phases = simulate(World(ranks=ranks, tensors=tensors)).saves["first save"]["rank 0"]
    figures = {
        "shardckpt": sum(phase.decide_s for phase in phases if phase.name in ("plan", "divide")),
        "DCP": dcp.unpickle_s + dcp.plan_s,
    }
    return [
        Row(
            title=f"planning, rank 0, {ranks:,} ranks x {tensors:,} tensors",
            unit="s",
            figures=figures,
            targets=[Target(against="DCP", factor=50)],
        )
    ]
