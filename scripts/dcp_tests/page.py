"""The page docs/dcp.md."""

from __future__ import annotations

HEAD = """# DCP test suite

`scripts/dcp_suite PATH` runs PyTorch's own tests of torch.distributed.checkpoint, from a checkout
of PyTorch, and writes this page. It runs each test file that uses a storage twice: with DCP's
`FileSystemWriter` and `FileSystemReader`, and with `ShardWriter` and `ShardReader` in their place.
The tests run on CPU: the script replaces GPUs by CPUs in copies of the files, and ranks talk over
gloo.
"""
TRANSFORMS = "shardckpt has no stream transforms: the safetensors library opens each shard."
EXISTS = (
    "the error is a `CheckpointExistsError` with another text. The path keeps its checkpoint, as "
    "in DCP."
)
EXPLANATIONS: dict[str, str] = {
    "extensions": TRANSFORMS,
    "Rot13": TRANSFORMS,
    "ZStandard": TRANSFORMS,
    "test_overwrite": EXISTS,
    "WithCaching": "`enable_plan_caching=True` is refused: DCP then calls the writer with the plan "
    "of an earlier save, and does not compare dtypes. `ShardSavePlanner` reuses plans by itself.",
    "test_torch_save_to_dcp": "the test saves into a folder with another file. shardckpt replaces "
    "only checkpoints, since a checkpoint appears as a complete folder.",
}
"""A part of the name of a test, and why shardckpt differs from DCP."""


def explanation(test: str) -> str | None:
    """Return why a test fails with shardckpt, or None."""
    return next((text for part, text in EXPLANATIONS.items() if part in test), None)


def different(results: dict) -> list[str]:
    """Return the tests that pass with DCP and don't pass with shardckpt."""
    theirs, ours = results["cases"]["torch"], results["cases"]["shardckpt"]
    return [test for test in sorted(theirs) if theirs[test] == "passed" != ours.get(test)]


def unexplained(results: dict) -> list[str]:
    """Return the differences without an explanation, with the errors."""
    ours = results["cases"]["shardckpt"]
    return [f"{test}: {ours.get(test)}" for test in different(results) if not explanation(test)]


def page(results: dict, left_out: dict[str, str]) -> str:
    """Return the page for the results."""
    theirs, ours = results["cases"]["torch"], results["cases"]["shardckpt"]
    differences = different(results)
    passed = sum(outcome == "passed" for outcome in ours.values())
    text = HEAD + (
        f"\nThe tests of PyTorch {results['tests_of']} ran with PyTorch {results['torch']}: "
        f"{passed} of {len(ours)} tests pass with shardckpt, "
        f"{sum(outcome == 'passed' for outcome in theirs.values())} with DCP.\n\n"
        "| Tests | Number | Pass with DCP | Pass with shardckpt | Differences |\n"
        "|---|---|---|---|---|\n"
    )
    for file in sorted({test.partition(":")[0] for test in ours}):
        names = [test for test in ours if test.startswith(f"{file}:")]
        counts = [sum(cases.get(name) == "passed" for name in names) for cases in (theirs, ours)]
        text += f"| `{file}` | {len(names)} | {counts[0]} | {counts[1]} "
        text += f"| {sum(test.startswith(f'{file}:') for test in differences)} |\n"
    text += "\n## Differences\n\n"
    for part, why in EXPLANATIONS.items():
        count = sum(part in test for test in differences)
        if count:
            text += f"- `{part}` ({count} test{'s' * (count > 1)}): {why}\n"
    text += "".join(f"- `{test}`: not explained\n" for test in differences if not explanation(test))
    text += "\n## Tests that do not pass with DCP here\n\n"
    for test in sorted(theirs):
        if theirs[test] != "passed":
            text += f"- `{test.partition(': ')[2]}`: {theirs[test]}\n"
    text += "\n## Tests that are left out\n\n"
    return text + "".join(f"- `{part}`: {why}\n" for part, why in left_out.items())
