"""Mutation testing of the commit, of verification and of the errors: each mutant is one change to
the source, and some test must fail for it.

    python -m tests.faults.mutate [--only MODULE] [--part 1/4]

Every mutant runs in a fork that has torch imported already. mutmut copies the package and imports
torch anew for each mutant, which takes hours here.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch  # noqa: F401

COMMIT = [
    "tests/storage/test_lock.py",
    "tests/storage/test_deletion.py",
    "tests/storage/test_local.py",
    "tests/storage/test_local_reader.py",
    "tests/faults/test_crash_states.py::test_crash_states_of_a_save_can_be_loaded",
    "tests/faults/test_crash_states.py::test_crash_states_after_a_dead_save",
    "tests/faults/test_retention.py::test_crash_states_of_a_manager_can_be_loaded",
    "tests/faults/test_errnos.py::test_every_call_failing",
]
TARGETS = {
    "shardckpt.storage.local": COMMIT,
    "shardckpt.storage.lock": COMMIT,
    "shardckpt.storage.deletion": COMMIT,
    "shardckpt.maintenance.verify": [
        "tests/maintenance/test_verify.py",
        "tests/maintenance/test_rescue.py",
        "tests/faults/test_damage.py",
    ],
    "shardckpt.errors": ["tests/test_errors.py"],
}
"""module -> the tests that must notice, quick ones first."""

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "ends = [min(_size(files, shard) or 0, shard.size_bytes) for shard in manifest.shards]",
        "constant: 0",
    ): "a file of one byte is cut before its first block: nothing of it is read either",
    (
        'with workers(current().read_threads, "shardckpt-verify", buffers=0) as (pool, _):',
        "constant: 0",
    ): "a buffer too many",
    (
        "lost = range(size // BLOCK_BYTES, last) if size < shard.size_bytes else ()",
        "comparison: size < shard.size_bytes",
    ): "the sizes differ here",
    ("if time.monotonic() > give_up_at:", "comparison: time.monotonic() > give_up_at"): (
        "no clock says exactly that"
    ),
    ("leftovers.remove(old)", "statement gone: leftovers.remove(old)"): (
        "it has another name now: nothing is there to be removed"
    ),
    (
        "file = LocalFile(self._system, path, size_bytes=len(manifest), direct=False)",
        "constant: False",
    ): "the disk refuses to take it past the cache, and it goes through it: the same bytes",
    ("return False", "returns None: return False"): "either says no",
    (
        'self.direct = direct and hasattr(os, "O_DIRECT")',
        "and/or: direct and hasattr(os, 'O_DIRECT')",
    ): "the manifest then: the disk refuses to take it past the cache, as above",
    (
        "class _Told(msgspec.Struct, array_like=True):",
        "constant: True",
    ): "what travels between ranks has names then, and says the same",
}
"""(the source line, what a mutant changes there) -> why nobody can tell the difference."""

HANGS_S = 300
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the mutants of a node, each with a word that describes it."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "comparison", _with(node, ops=[COMPARISONS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield "and/or", _with(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not", node.operand
    elif isinstance(node, ast.IfExp):
        yield "branches", _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node, ast.If):
        yield "condition", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Yield)):
        if isinstance(node.value, ast.Call):
            yield "statement gone", ast.Pass()
    elif isinstance(node, ast.Raise):
        yield "raise gone", ast.Pass()
    elif isinstance(node, ast.Return) and not _is_none(node.value):
        yield "returns None", _with(node, value=ast.Constant(None))
    elif isinstance(node, ast.Break):
        yield "break", ast.Continue()


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


class _Replace(ast.NodeTransformer):
    """Visits nodes in a fixed order and makes change number `wanted`; without it, lists all."""

    def __init__(self, wanted: int | None = None) -> None:
        self.wanted = wanted
        self.found: list[str] = []

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.AnnAssign, ast.arg)) or _is_text(node):
            return node
        for word, changed in changes(node):
            number = len(self.found)
            self.found.append(f"line {getattr(node, 'lineno', 0)}: {word}: {_short(node)}")
            if number == self.wanted:
                return ast.fix_missing_locations(ast.copy_location(changed, node))
        if isinstance(node, ast.FunctionDef):
            returns, node.returns = node.returns, None  # no code
            visited = self.generic_visit(node)
            node.returns = returns
            return visited
        return self.generic_visit(node)


def _is_text(node: ast.AST) -> bool:
    """Whether a node is only text for people or type checkers: f-strings, messages, __all__."""
    if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return True
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _short(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:70]


def mutants(source: str) -> list[str]:
    """List the change of each mutant of a module."""
    lister = _Replace()
    lister.visit(ast.parse(source))
    return lister.found


def mutant(source: str, number: int) -> ast.AST:
    return ast.fix_missing_locations(_Replace(number).visit(ast.parse(source)))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Gives one module another code."""

    def __init__(self, name: str, path: Path, tree: ast.AST) -> None:
        self.name, self.path, self.tree = name, str(path), tree

    def find_spec(self, fullname, path, target=None):  # type: ignore[no-untyped-def]
        if fullname != self.name:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=self.path)

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def get_code(self, fullname: str):  # type: ignore[no-untyped-def]
        return compile(self.tree, self.path, "exec")  # type: ignore[arg-type]


def preload() -> None:
    """Import what tests need, and forget the project: forks have the rest already. Nothing is run:
    forks of a process with threads hang."""
    for name in ("shardckpt.nn_handler", "shardckpt.integrations.dcp"):
        importlib.import_module(name)
    for name in list(sys.modules):
        if name.partition(".")[0] == "shardckpt":
            del sys.modules[name]


def killed(module: str, number: int | None) -> bool:
    """Whether a test fails, or hangs, for a mutant (None: for the module as it is)."""
    path = Path(*module.split(".")).with_suffix(".py")
    child = os.fork()
    if child == 0:
        os.setsid()
        if number is not None:
            tree = mutant(path.read_text(), number)
            sys.meta_path.insert(0, _Finder(module, path, tree))
        told = os.fdopen(os.dup(2), "w")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not ranks"]
        code = 1
        try:
            code = int(pytest.main([*arguments, *TARGETS[module]]))
        except BaseException as error:
            print(f"{module}, mutant {number}: {error!r}", file=told, flush=True)
        finally:
            os._exit(code)
    give_up_at = time.monotonic() + HANGS_S
    while time.monotonic() < give_up_at:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> int:
    """Run the mutants; 1 if fewer than 95% are killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--part", default="1/1", help="n/t: every t-th mutant from the n-th on")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    preload()
    total = alive = 0
    for module in options.only:
        source = Path(*module.split(".")).with_suffix(".py").read_text()
        found = mutants(source)
        lines = source.splitlines()
        numbers = [n for n, what in enumerate(found) if _known(lines, what) not in EQUIVALENT]
        numbers = numbers[part - 1 :: parts]
        assert not killed(module, None), f"the tests of {module} fail as it is"
        survivors = 0
        for tried, number in enumerate(numbers, 1):
            if not killed(module, number):
                survivors += 1
                print(f"  alive: {module}, {found[number]}", flush=True)
            if tried % 10 == 0:
                print(f"  {tried} of {len(numbers)} tried", flush=True)
        print(
            f"{module}: {len(numbers)} of {len(found)} mutants tried, {survivors} alive", flush=True
        )
        total, alive = total + len(numbers), alive + survivors
    print(f"{100 * (total - alive) / total:.1f}% of {total} killed")
    return 1 if alive > 0.05 * total else 0


def _known(lines: list[str], what: str) -> tuple[str, str]:
    """A mutant as EQUIVALENT knows it."""
    where, _, change = what.partition(": ")
    return lines[int(where.removeprefix("line ")) - 1].strip(), change


if __name__ == "__main__":
    sys.exit(main())
