"""The command line: which cases, how large, how often."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

from benchmarks.cases import CASES, Bench
from benchmarks.peers import present
from benchmarks.table import Row, as_markdown, as_text, from_json, merged


def main() -> None:
    """Run cases and print their rows as they come."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="shardckpt beside its peers and the limit of this machine.",
        epilog="cases: " + "; ".join(f"{name}: {run.__doc__}" for name, run in CASES.items()),
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all", default=[])
    parser.add_argument("--size-mb", type=float, default=1000, help="of a state; default 1000")
    parser.add_argument(
        "--store-mb", type=float, default=200, help="in the cases of object stores; default 200"
    )
    parser.add_argument("--rounds", type=int, default=5, help="that are measured; default 5")
    parser.add_argument("--small", type=int, default=20_000, help="number of small tensors")
    parser.add_argument("--planning", default="1024x1000", help="ranks x tensors of that case")
    parser.add_argument("--dir", help="on the disk to be measured; default: the temporary one")
    parser.add_argument("--peers", help="only these, as in 'shardckpt;DCP'; default: all installed")
    parser.add_argument("--json", help="add rows and samples to this file")
    parser.add_argument("--markdown", help="write all rows of --json as a table to this file")
    parser.add_argument("--plot", help="draw all rows of --json as an SVG to this file")
    options = parser.parse_args()
    for name in options.cases:
        if name not in CASES:
            parser.error(f"no case {name!r}; there are {', '.join(CASES)}")
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["PYTHONWARNINGS"] = "ignore"  # for the processes that peers start
    if options.peers:
        os.environ["BENCH_PEERS"] = options.peers
    for name, reason in present()[1].items():
        print(f"not compared: {name}: {reason}", flush=True)
    root = tempfile.mkdtemp(prefix="shardckpt-bench-", dir=options.dir)
    ranks, _, tensors = options.planning.partition("x")
    bench = Bench(
        root=root,
        size_bytes=options.size_mb * 1e6,
        store_bytes=options.store_mb * 1e6,
        rounds=options.rounds,
        small=options.small,
        planning=(int(ranks), int(tensors)),
    )
    rows: list[Row] = []
    try:
        for name in options.cases or CASES:
            for row in CASES[name](bench):
                print(as_text(row), flush=True)
                rows.append(row)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    earlier = json.loads(_text(options.json) or '{"rows": [], "samples": {}}')
    rows = merged(from_json(earlier["rows"]), rows)
    if options.json:
        samples = {**earlier["samples"], **bench.found}
        found = {"rows": [asdict(row) for row in rows], "samples": samples}
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        Path(options.markdown).write_text(as_markdown(rows) + "\n")
    if options.plot:
        from benchmarks.plot import plot

        plot(rows, options.plot)


def _text(path: str | None) -> str:
    return Path(path).read_text() if path and Path(path).exists() else ""


if __name__ == "__main__":
    main()
