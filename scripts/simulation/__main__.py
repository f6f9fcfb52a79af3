"""scripts/simulate: what planning costs at any size.

scripts/simulate 1024x1000                     one save, one more, and a load
scripts/simulate 1024x1000 --layout hsdp
scripts/simulate --growth docs/scale.json      the sizes of docs/scale.md, each in a process
scripts/simulate --growth few.json 10x3 30x3   other sizes
scripts/simulate --plot docs/scale.json docs/scale.svg
scripts/simulate --table docs/scale.json       the table of docs/scale.md
scripts/simulate --dcp 64x1000 128x1000        rank 0 of default DCP, beside shardckpt
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

GROWTH = [(ranks, 300) for ranks in (10, 30, 100, 300, 1000, 3000, 10_000, 16_384)]
GROWTH.insert(5, (1024, 1000))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sizes", nargs="*", type=size, metavar="RANKSxTENSORS")
    parser.add_argument("--layout", choices=["fsdp", "hsdp", "tp", "ddp"], default="fsdp")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "WHO"), help=argparse.SUPPRESS)
    parser.add_argument("--dcp", action="store_true", help="compare with default DCP")
    parser.add_argument("--growth", type=Path, metavar="JSON", help="run several sizes")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "SVG"))
    parser.add_argument("--table", type=Path, metavar="JSON")
    asked = parser.parse_args()
    if asked.plot:
        from simulation.plot import plot

        plot(json.loads(asked.plot[0].read_text()), asked.plot[1])
    elif asked.table:
        table(json.loads(asked.table.read_text()))
    elif asked.growth:
        worlds = [alone(*world) for world in asked.sizes or GROWTH]
        asked.growth.write_text(json.dumps(worlds, indent=1) + "\n")
    elif asked.load:
        ((ranks, tensors),) = asked.sizes
        print(json.dumps(one_load(ranks, tensors, asked.layout, *asked.load)))
    elif asked.json:
        for ranks, tensors in asked.sizes:
            print(json.dumps(run(ranks, tensors, asked.layout)))
    elif asked.dcp:
        for ranks, tensors in asked.sizes:
            compare(ranks, tensors)
    else:
        for ranks, tensors in asked.sizes:
            show(run(ranks, tensors, asked.layout))


def size(text: str) -> tuple[int, int]:
    """`1024x1000` as numbers."""
    ranks, _, tensors = text.partition("x")
    if not (ranks.isdecimal() and tensors.isdecimal() and int(ranks) > 0 and int(tensors) > 0):
        raise argparse.ArgumentTypeError(f"a size such as 1024x1000 is expected, found {text!r}")
    return int(ranks), int(tensors)


def run(ranks: int, tensors: int, layout: str) -> dict[str, Any]:
    """Simulate a job, and return its costs."""
    from simulation.run import simulate
    from simulation.world import World

    return dataclasses.asdict(simulate(World(ranks=ranks, tensors=tensors, layout=layout)))


def one_load(ranks: int, tensors: int, layout: str, folder: str, who: str) -> dict[str, float]:
    """Plan the load of one rank, and return its costs."""
    from simulation.run import load
    from simulation.world import World

    return load(World(ranks=ranks, tensors=tensors, layout=layout), folder, who)


def alone(ranks: int, tensors: int) -> dict[str, Any]:
    """The same in a process of its own, so that the memory is its own."""
    print(f"{ranks} ranks x {tensors} tensors", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "simulation", "--json", f"{ranks}x{tensors}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def show(found: dict[str, Any]) -> None:
    """A table of one world."""
    world = found["world"]
    print(f"\n{world['ranks']} ranks x {world['tensors']} tensors, {world['layout']}")
    print(f"{'':32}{'own part':>10}{'decision':>10}{'sent':>14}{'received':>14}")
    for save, by_rank in found["saves"].items():
        for who, phases in by_rank.items():
            print(f"{save}, {who}")
            for phase in phases:
                print(
                    f"  {phase['name']:30}{phase['own_s']:9.3f}s{phase['decide_s']:9.3f}s"
                    f"{phase['sent_bytes']:>14,}{phase['received_bytes']:>14,}"
                )
            decided = sum(phase["decide_s"] for phase in phases)
            print(f"  {'all decisions' if who == 'rank 0' else '':30}{'':10}{decided:9.3f}s")
    for who, load in found["loads"].items():
        print(f"load by three quarters as many ranks, {who}")
        for phase in ("manifest", "match", "reads", "compare"):
            print(f"  {phase:30}{load[phase]:9.3f}s")
        print(f"  {'memory':30}{load['memory_bytes'] >> 20:9,} MiB")
        print(f"  {'ranges of the other ranks':30}{load['ranges_bytes']:9,} bytes")
    chunks = found["chunks"]
    print(
        f"manifest {found['manifest_bytes']:,} bytes, {chunks:,} chunks, "
        f"{found['manifest_bytes'] / chunks:.1f} bytes each; "
        f"peak memory {found['peak_bytes'] >> 20:,} MiB, all ranks' plans included"
    )


def table(results: list[dict[str, Any]]) -> None:
    """Worlds as a table in Markdown."""
    print(
        "| ranks x tensors | first save: divide, s | manifest, s | bytes to rank 0 / from it "
        "| repeated save, s | bytes to rank 0 | manifest, bytes a chunk | load: manifest, s "
        "| match and reads, s | memory, MiB | load on rank 0, s |\n|" + "---|" * 11
    )
    for found in results:
        first, again = (save["rank 0"] for save in found["saves"].values())
        divide, write = (
            sum(phase["decide_s"] for phase in first if (phase["name"] == "write") is last)
            for last in (False, True)
        )
        lead, load = found["loads"]["rank 0"], found["loads"]["ordinary rank"]
        on_rank_0 = sum(lead[phase] for phase in ("manifest", "match", "reads", "compare"))
        received, sent = (
            sum(phase[way] for phase in first) for way in ("received_bytes", "sent_bytes")
        )
        print(
            f"| {found['world']['ranks']:,} x {found['world']['tensors']:,} "
            f"| {divide:.2f} | {write:.2f} | {received:,} / {sent:,} "
            f"| {sum(phase['decide_s'] for phase in again):.3f} "
            f"| {sum(phase['received_bytes'] for phase in again):,} "
            f"| {found['manifest_bytes'] / found['chunks']:.1f} "
            f"| {load['manifest']:.2f} | {load['match'] + load['reads']:.2f} "
            f"| {load['memory_bytes'] >> 20:,} | {on_rank_0:.2f} |"
        )


def compare(ranks: int, tensors: int) -> None:
    """Rank 0's planning, by DCP and by shardckpt, in this order in one process."""
    from simulation.dcp import simulate_dcp
    from simulation.world import World

    dcp = simulate_dcp(World(ranks=ranks, tensors=tensors))
    phases = run(ranks, tensors, "fsdp")["saves"]["first save"]["rank 0"]
    own = sum(phase["decide_s"] for phase in phases if phase["name"] in ("plan", "divide"))
    theirs = dcp.unpickle_s + dcp.plan_s
    print(
        f"{ranks} ranks x {tensors} tensors: DCP {dcp.unpickle_s:.2f} s to unpickle "
        f"{dcp.received_bytes:,} bytes, {dcp.plan_s:.2f} s to plan; "
        f"shardckpt {own:.3f} s in all; {theirs / own:.0f} x",
        flush=True,
    )


if __name__ == "__main__":
    main()
