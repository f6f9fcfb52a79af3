"""The page docs/versions.md."""

from __future__ import annotations

HEAD = """# Versions

`scripts/versions` makes an environment for each row, runs the part of the tests that depends on
PyTorch, and writes this page. Each version writes a checkpoint on two ranks: each dtype, a model
and AdamW under FSDP2, shards along rows and columns, arrays and values. Every version reads the
checkpoints of all versions on two ranks, and compares every bit.

| PyTorch | Python | numpy | Tests passed | Skipped | Failed | Reads the checkpoints of |
|---|---|---|---|---|---|---|
"""
DIFFERENCES = """
## Differences between versions

`shardckpt/torch_compat.py` contains all names of PyTorch that are private or that differ between
versions. Some differences concern users:

- PyTorch before 2.8 has no `float4_e2m1fn_x2`, and PyTorch 2.6 has no `float8_e8m0fnu`. A
  checkpoint with such a tensor raises a `CheckpointError` there, which names the dtype.
- In PyTorch 2.6, FSDP2 can't gather parameters on CPU ranks: `'Stream' object has no attribute
  'record_event'`. FSDP2 needs GPUs there. Its state is saved and loaded on both.
- Before PyTorch 2.8, `destroy_process_group()` directly after a collective on CPU ranks can hang.
  Wait for a tenth of a second first. The groups that shardckpt destroys itself do not hang.
- Python 3.12.0 and 3.12.1 start no threads at the end of a program. An asynchronous save that still
  runs then fails, and its error is logged: call `result()`.
- In PyTorch 2.8, the state of SWALR contains a function, which a checkpoint refuses.
"""


def page(names: list[str], results: dict[str, dict], tests: list[str]) -> str:
    """Return the page for the results by name."""
    run = [name for name in names if "passed" in results.get(name, {})]
    rows = [_row(name, results[name], run) for name in run]
    absent = [
        f"- {name}: {results.get(name, {}).get('not_run', 'not run yet')}.\n"
        for name in names
        if name not in run
    ]
    failed = [f"- {name}: `{test}`\n" for name in run for test in results[name]["failed"]]
    text = HEAD + "".join(rows)
    if failed:
        text += "\n## Failed tests\n\n" + "".join(failed)
    if absent:
        text += "\n## Not run\n\n" + "".join(absent)
    text += DIFFERENCES
    return text + "\n## Tests\n\n" + "".join(f"- `{test}`\n" for test in tests)


def _row(name: str, result: dict, run: list[str]) -> str:
    torch, python = (part.split()[1] for part in name.split(", "))
    reads = result["reads"]
    short = dict.fromkeys(other.split()[1].rstrip(",") for other in reads)
    read = "all" if set(run) <= set(reads) else ", ".join(short)
    cells = [torch, python, result["numpy"], result["passed"], result["skipped"]]
    cells += [len(result["failed"]), read]
    return "| " + " | ".join(map(str, cells)) + " |\n"
