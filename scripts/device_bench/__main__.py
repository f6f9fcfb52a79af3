"""Check saves and loads of device tensors, and compare them with peers and with the machine.

    scripts/gpu                              # 8 GB on the accelerator of this machine
    scripts/gpu --device cpu --size 0.1      # a dry run

It needs torch, numpy, safetensors, xxhash and msgspec, no network and no installation. It prints
one table in Markdown, with the medians of rounds in which the contestants take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time

NEEDED = ("torch", "numpy", "safetensors", "xxhash", "msgspec")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="by default the accelerator that torch finds")
    parser.add_argument("--size", type=float, default=8.0, help="GB of tensors (8)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds at most (5)")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no round later (7)")
    parser.add_argument("--dir", help="the folder for the files (the one for temporary files)")
    options = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"missing packages: {', '.join(missing)}; unpack their wheels into a folder of "
            "PYTHONPATH, or set PYTHON to an interpreter that has them",
            file=sys.stderr,
        )
        return 2
    import torch

    from device_bench.checks import run_checks
    from device_bench.measure import measure, table

    device = options.device or torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        print("torch finds no accelerator; --device cpu makes a dry run", file=sys.stderr)
        return 2
    device, begun = torch.device(device), time.monotonic()
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        failed = run_checks(device, folder)
        results = measure(
            device,
            folder,
            size_bytes=int(options.size * 1e9),
            rounds=options.rounds,
            until=begun + 60 * options.minutes,
        )
    print(table(results, device, size_gb=options.size))
    print(
        f"\n{time.monotonic() - begun:.0f} s in all; failed checks: {', '.join(failed) or 'none'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
