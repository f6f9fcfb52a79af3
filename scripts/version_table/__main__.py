"""The command: make an environment for each version, test in it, and write the table."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from version_table.page import page

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
VERSIONS = [
    ("2.6.0", "3.10", "1.26.4"),
    ("2.8.0", "3.11", "1.26.4"),
    ("2.10.0", "3.12", "2.*"),
    ("2.12.1", "3.13", "2.*"),
    ("2.13.0", "3.12", "2.*"),
    ("2.14.1", "3.13", "2.*"),
    ("2.14.1", "3.14", "2.*"),
]
"""torch, Python, numpy."""
TESTS = [
    "tests/test_torch_compat.py", "tests/test_api.py", "tests/state", "tests/format",
    "tests/loading", "tests/saving", "tests/integrations", "tests/distributed/test_matrix.py",
    "tests/coordination/test_store.py", "tests/coordination/test_store_connection.py",
    "tests/nn_handler/test_handler.py", "tests/nn_handler/test_emergency.py",
]  # fmt: skip
"""The part of the tests that depends on torch."""
TOOLS = ["pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "opentelemetry-sdk"]
FREE_BYTES = 12 << 30
"""The disk space that an installation needs: up to 4 GB of downloads, and 7 GB in the end."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/versions", description=__doc__)
    parser.add_argument("torch", nargs="*", help="versions of torch; default: all of the table")
    parser.add_argument(
        "--work", type=Path, help="a folder to keep environments and checkpoints in"
    )
    parser.add_argument("--prefix", default="", help='a command before each command, as "nice"')
    parser.add_argument("--only-reads", action="store_true", help="compare checkpoints, no tests")
    parser.add_argument("--only-page", action="store_true", help="write the page alone")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.only_page:
        with tempfile.TemporaryDirectory() as temporary:
            work = (arguments.work or Path(temporary)).absolute()
            work.mkdir(parents=True, exist_ok=True)
            chosen = [row for row in VERSIONS if not arguments.torch or row[0] in arguments.torch]
            run = Run(work, arguments.prefix.split(), results)
            run.all(chosen, tests=not arguments.only_reads)
    PAGE.write_text(page([name(*row) for row in VERSIONS], results, TESTS))


def name(torch: str, python: str, numpy: str) -> str:
    return f"torch {torch}, Python {python}"


class Run:
    """The environments below a folder, and what was found in them."""

    def __init__(self, work: Path, prefix: list[str], results: dict[str, dict]) -> None:
        self.work, self.prefix, self.results = work, prefix, results
        self.read_by: dict[tuple[str, str, str], dict[tuple[str, str, str], bool]] = {}

    def all(self, rows: list[tuple[str, str, str]], *, tests: bool) -> None:
        """Test one row after another, then read the checkpoints of later rows with earlier ones."""
        for row in rows:
            if not self.make(*row):
                continue
            if tests or not self.checkpoint(row).exists():
                self.states(row, "write", self.checkpoint(row))
            self.read(row)
            if tests:
                self.results[name(*row)] |= self.tests(row)
            self.save()
        for row in rows:
            if self.checkpoint(row).exists():
                self.read(row)
                self.save()

    def read(self, row: tuple[str, str, str]) -> None:
        """Read all checkpoints that exist and that this row has not read."""
        reads = self.read_by.setdefault(row, {})
        for other in VERSIONS:
            if self.checkpoint(other).exists() and other not in reads:
                self.make(*row)  # it may have been removed for a later row
                reads[other] = self.states(row, "read", self.checkpoint(other))
        self.results[name(*row)]["reads"] = [name(*other) for other in reads if reads[other]]

    def save(self) -> None:
        RESULTS.write_text(json.dumps(self.results, indent=1) + "\n")

    def environment(self, row: tuple[str, str, str]) -> Path:
        return self.work / f"torch-{row[0]}-python-{row[1]}"

    def checkpoint(self, row: tuple[str, str, str]) -> Path:
        return self.work / f"written-by-torch-{row[0]}-python-{row[1]}"

    def make(self, torch: str, python: str, numpy: str) -> bool:
        """Make an environment, unless it exists. False if this machine can't."""
        row = (torch, python, numpy)
        result = self.results.setdefault(name(*row), {})
        result.pop("not_run", None)
        found, folder = interpreter(python), self.environment(row)
        if found is None:
            result["not_run"] = f"this machine has no Python {python}"
        elif not (folder / "done").exists() and not self.has_space():
            result["not_run"] = "the disk is full"
        elif not (folder / "done").exists():
            print(f"installing {name(*row)}", flush=True)
            subprocess.run([found, "-m", "venv", "--clear", folder], check=True)
            pins = folder / "constraints.txt"
            pins.write_text(f"torch=={torch}\nnumpy=={numpy}\n")
            install = ["bin/pip", "install", "--quiet", "--no-cache-dir", "-c", pins]
            for what in (["torch"], ["-e", f"{ROOT}[cli,progress,telemetry]", *TOOLS]):
                if self.call(row, [*install, *what]):
                    result["not_run"] = "pip could not install it"
                    break
            else:
                (folder / "done").touch()
        self.save()
        return "not_run" not in result

    def has_space(self) -> bool:
        """Remove the oldest environments until there is space for another one."""
        made = sorted(self.work.glob("torch-*/done"), key=lambda done: done.stat().st_mtime)
        while shutil.disk_usage(self.work).free < FREE_BYTES and made:
            shutil.rmtree(made.pop(0).parent)
        return shutil.disk_usage(self.work).free >= FREE_BYTES

    def call(self, row: tuple[str, str, str], command: list, **options) -> int:
        """Run a program of an environment in the root of the project. Returns its exit code."""
        program, *rest = command
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*self.prefix, self.environment(row) / program, *rest],
            cwd=ROOT, env=environment, **options,
        )  # fmt: skip
        return done.returncode

    def states(self, row: tuple[str, str, str], action: str, folder: Path) -> bool:
        """Write or read the checkpoint of version_table.states, on two ranks."""
        if action == "write":
            shutil.rmtree(folder, ignore_errors=True)
        program = Path(__file__).parent / "states.py"
        run = ["bin/python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        print(f"{name(*row)}: {action} {folder.name}", flush=True)
        return self.call(row, [*run, program, action, folder]) == 0

    def tests(self, row: tuple[str, str, str]) -> dict:
        """Run the tests. Returns their numbers, and the names of those that failed."""
        report = self.environment(row) / "report.xml"
        report.unlink(missing_ok=True)
        pytest = [
            "bin/python",
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "--tb=short",
            "-p",
            "no:cacheprovider",
        ]
        print(f"{name(*row)}: tests", flush=True)
        self.call(row, [*pytest, f"--junitxml={report}", *TESTS])
        cases = list(ElementTree.parse(report).iter("testcase"))
        failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
        skipped = [c for c in cases if c.find("skipped") is not None]
        return {
            "passed": len(cases) - len(failed) - len(skipped),
            "skipped": len(skipped),
            "failed": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
            "numpy": self.numpy(row),
        }

    def numpy(self, row: tuple[str, str, str]) -> str:
        ask = [self.environment(row) / "bin/python", "-c", "import numpy; print(numpy.__version__)"]
        return subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()


def interpreter(version: str) -> str | None:
    """Return a Python of this version: one on the PATH, or one of pyenv."""
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))
    for path in (shutil.which(f"python{version}"), *map(str, of_pyenv)):
        if path and not subprocess.run([path, "--version"], capture_output=True).returncode:
            return path
    return None


if __name__ == "__main__":
    sys.exit(main())
