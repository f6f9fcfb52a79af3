"""The command: copy the tests, run them with the classes of both libraries, and write the page."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from dcp_tests.page import page, unexplained

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "dcp.json"
PAGE = ROOT / "docs" / "dcp.md"
TESTS = "test/distributed/checkpoint"
STORAGE = re.compile(
    r"FileSystem(Writer|Reader)|Fsspec(Writer|Reader)|checkpoint_id=|torch_save_to_dcp"
)
"""Tests whose files match use a storage."""
LEFT_OUT = {
    "_experimental": "a prototype of another library",
    "test_hf_storage.py": "the files of Hugging Face, which FileSystemWriter does not write",
    "test_hf_safetensor_e2e.py": "the files of Hugging Face",
    "test_quantized_hf_storage.py": "the files of Hugging Face",
    "test_consolidate_hf_safetensors.py": "the files of Hugging Face",
    "test_cuobj_rdma_storage.py": "a storage that needs RDMA hardware",
    "test_fsdp_ep.py": "eight ranks",
}
"""Parts of paths, and why the tests are left out."""
FOR_CPU = [
    (r"cpu:gloo,cuda:nccl", "gloo"),
    (r"/cuda:\{?\w+\}?", "/cpu"),
    (r"f?([\"'])cuda(:\d|:\{[^}]*\})?\1", r"\1cpu\1"),
    (r"\.cuda\(([\w.]+(\(\))?)?\)", ".cpu()"),
    (r"torch\.cuda\.device_count\(\)", "4"),
    (r"torch\.cuda\.synchronize\(\)", "None"),
    (r"device=(dist\.get_rank\(\)|self\.rank)", 'device="cpu"'),
    (r"/tmp/dcp_testing", "dcp_testing"),  # a path that all runs share
]
"""Patterns and what they become, so that tests for GPUs run on CPU."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/dcp_suite", description=__doc__)
    parser.add_argument("pytorch", type=Path, help="a checkout of PyTorch")
    parser.add_argument("--jobs", default="2", help="tests that run at a time")
    parser.add_argument("--only", default="", help="run the tests again that pytest -k chooses")
    parser.add_argument("--only-page", action="store_true", help="write the page from dcp.json")
    arguments = parser.parse_args()
    if importlib.util.find_spec("expecttest") is None:
        raise SystemExit("PyTorch's tests need two packages: pip install expecttest zstandard")
    results: dict = {"cases": {"torch": {}, "shardckpt": {}}}
    if arguments.only or arguments.only_page:
        results = json.loads(RESULTS.read_text())
    if not arguments.only_page:
        results["torch"] = torch.__version__.partition("+")[0]
        results["tests_of"] = (arguments.pytorch / "version.txt").read_text().strip().rstrip("a0")
        with tempfile.TemporaryDirectory() as folder:
            copied = copy(arguments.pytorch / TESTS, Path(folder) / "tests")
            for classes, cases in results["cases"].items():
                cases |= run(Path(folder), copied, classes, arguments.jobs, arguments.only)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results, LEFT_OUT))
    for test in unexplained(results):
        print(f"unexplained difference: {test}")
    return int(bool(unexplained(results)))


def copy(source: Path, target: Path) -> list[Path]:
    """Copy the tests that use a storage, changed for CPU. Returns the copies."""
    copies = []
    for file in sorted(source.rglob("test_*.py")):
        text = file.read_text()
        name = file.relative_to(source)
        if not STORAGE.search(text) or any(part in str(name) for part in LEFT_OUT):
            continue
        for pattern, replacement in FOR_CPU:
            text = re.sub(pattern, replacement, text)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(f"import dcp_tests.replace  {text}")  # before "# Owner(s)"
        copies.append(target / name)
    if not copies:
        raise SystemExit(f"{source}: no tests of torch.distributed.checkpoint")
    return copies


def run(folder: Path, files: list[Path], classes: str, jobs: str, only: str) -> dict[str, str]:
    """Run the copied tests with the classes of one library. Returns the outcome of each test."""
    report, work = folder / f"{classes}.xml", folder / classes
    work.mkdir()
    ours = [str(ROOT / "scripts"), str(ROOT)]
    python_path = os.pathsep.join([*ours, *sys.path[1:]])
    environment = {
        **os.environ, "DCP_TESTS_CLASSES": classes, "PYTHONPATH": python_path,
        "OMP_NUM_THREADS": "1", "TMPDIR": str(work),
    }  # fmt: skip
    pytest = [
        sys.executable, "-m", "pytest", "-q", "-n", jobs, "--tb=short", "-p", "no:cacheprovider",
        "--timeout=300", f"--rootdir={folder}", f"--junitxml={report}", "-c", os.devnull, "-rf",
    ]  # fmt: skip
    print(f"with the classes of {classes}", flush=True)
    subprocess.run([*pytest, "-k", only, *files], cwd=work, env=environment, check=False)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module, _, name = case.get("classname", "").rpartition(".")
        test = f"{module.removeprefix('tests.').replace('.', '/')}.py: {name}.{case.get('name')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            outcomes[test] = f"failed: {reason(bad.text or '')}"
        elif case.find("skipped") is not None:
            outcomes[test] = f"skipped: {case.find('skipped').get('message')}"
        else:
            outcomes[test] = "passed"
    return outcomes


def reason(text: str) -> str:
    """Return the line of a traceback that says what went wrong."""
    lines = [line.strip() for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"(E +)?[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [""])[-1].removeprefix("E").strip()[:200]


if __name__ == "__main__":
    sys.exit(main())
