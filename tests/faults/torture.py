"""The long run: every harness in turn, with random seeds, until the time is up.

A trial is determined by its harness and its seed alone, so that a failure can be replayed. A run
can also go on where another one ended: pass the --seed in the last column of the table.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

Trial = Callable[[int], int]
"""Tries something with a seed; returns how many units. Raises where something failed."""

HARNESSES = {
    "crash": ("tests.faults.retention:trial", "crash states"),
    "damage": ("tests.faults.damage:trial", "flipped bits and cuts"),
    "errnos": ("tests.faults.errnos:trial", "system calls failed by the seam"),
    "files": ("tests.faults.files:crash_trial", "crash states of single files and conversions"),
    "file-damage": ("tests.faults.files:damage_trial", "flipped bits of single files"),
    "hostile": ("tests.faults.test_hostile:trial", "calls with hostile checkpoints"),
    "handler": ("tests.faults.test_handler_attacks:trial", "hostile checkpoints of a handler"),
    "manifest": ("tests.faults.fuzz:manifest_trial", "inputs for the parser of manifests"),
    "large": ("tests.faults.fuzz:large_trial", "inputs for the ranks that parse a large manifest"),
    "header": ("tests.faults.fuzz:header_trial", "inputs for the parser of shard headers"),
    "stores": ("tests.faults.stores:trial", "requests that an object store failed"),
    "proxy": ("tests.faults.store_proxy:trial", "answers of an object server that failed"),
    "store-kills": ("tests.faults.store_kills:trial", "processes killed between two requests"),
    "meshes": ("tests.faults.test_meshes:trial", "states saved on one mesh, loaded on another"),
    "ranks": ("tests.faults.rank_faults:trial", "ranks that fail"),
    "kills": ("tests.faults.kills:trial", "processes killed at random"),
    "syscalls": ("tests.faults.syscalls:trial", "system calls killed or failed by strace"),
}
"""name -> (module:function of a trial, the noun that it counts)."""


@dataclass(slots=True)
class Tally:
    trials: int = 0
    units: int = 0
    seconds: float = 0.0
    failures: int = 0


def run_trial(name: str, seed: int) -> int:
    """One trial of a harness; how many units it tried."""
    module, _, function = HARNESSES[name][0].partition(":")
    trial: Trial = getattr(importlib.import_module(module), function)
    return trial(seed)


def torture(
    names: list[str], *, seed: int, seconds: float, units: int, trials: int
) -> dict[str, Tally]:
    """Trials of each harness in turn, with seeds from `seed` on, until the time is up, or each has
    tried so many units or made so many trials."""
    tallies = {name: Tally() for name in names}
    give_up_at = time.monotonic() + seconds
    shown = time.monotonic()
    while time.monotonic() < give_up_at:
        waiting = [n for n in names if tallies[n].units < units and tallies[n].trials < trials]
        if not waiting:
            break
        # The one that has had the least time: long trials don't starve short ones.
        name = min(waiting, key=lambda name: tallies[name].seconds)
        tally = tallies[name]
        begun = time.monotonic()
        try:
            tally.units += run_trial(name, seed + tally.trials)
        except Exception:
            tally.failures += 1
            print(f"\nFAILED {name}\n{traceback.format_exc()}", flush=True)
            again = f"scripts/torture --only {name} --seed {seed + tally.trials} --trials 1"
            print(f"again: {again}", flush=True)
        tally.trials += 1
        tally.seconds += time.monotonic() - begun
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(table(tallies, seed=seed), flush=True)
    return tallies


def table(tallies: dict[str, Tally], *, seed: int) -> str:
    """Return a table of the trials so far. `next` is the --seed that continues after them."""
    lines = [f"{'harness':12} {'trials':>8} {'tried':>10} {'failed':>7} {'seconds':>8} {'next':>6}"]
    for name, tally in tallies.items():
        lines.append(
            f"{name:12} {tally.trials:8} {tally.units:10} {tally.failures:7} "
            f"{tally.seconds:8.0f} {seed + tally.trials:6}  {HARNESSES[name][1]}"
        )
    return "\n".join(lines)


def main() -> int:
    """The command; 1 if anything failed."""
    parser = argparse.ArgumentParser("torture", description=__doc__)
    parser.add_argument("--minutes", type=float, help="60, if nothing else ends it")
    parser.add_argument("--seed", type=int, default=1, help="of the first trial of each harness")
    parser.add_argument("--only", nargs="+", choices=sorted(HARNESSES), default=sorted(HARNESSES))
    parser.add_argument("--units", type=int, help="stop after so many, each")
    parser.add_argument("--trials", type=int, help="stop after so many trials, each")
    options = parser.parse_args()
    endless = options.units is None and options.trials is None
    tallies = torture(
        options.only,
        seed=options.seed,
        seconds=60 * (options.minutes or (60 if endless else math.inf)),
        units=options.units or sys.maxsize,
        trials=options.trials or sys.maxsize,
    )
    print(
        f"\nseed {options.seed}, {time.strftime('%Y-%m-%d')}\n{table(tallies, seed=options.seed)}"
    )
    return 1 if any(tally.failures for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
