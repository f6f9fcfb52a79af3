"""Loads hostile checkpoints of a handler under an audit hook, and prints as JSON what each did.

python -m tests.faults.handler_child FOLDER [PLANT]; a planted hole must be seen by the test.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from subprocess import run as alias  # noqa: F401  a name of this script that a checkpoint gives
from typing import Any

from shardckpt import NNHandler
from shardckpt.nn_handler import bounds, objects
from tests.faults import handler_bait, hostile_child

ALLOWED = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove")


def record(*arguments: Any, **options: Any) -> float:
    handler_bait.called.append("a function of the script")
    return 1.0


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    watched = hostile_child.watched
    if watched is None:
        return
    if event == "import":
        hostile_child.seen.append(f"import {arguments[0]}")
    elif event == "open" and not isinstance(arguments[0], int):
        path = os.fsdecode(arguments[0])
        if watched not in (Path(path), *Path(path).parents):
            hostile_child.hook(event, arguments)
    else:
        hostile_child.hook(event, arguments)


def load(path: Path) -> None:
    NNHandler.load(path, device="cpu")


def imports_and_calls(name: str, slot: Any, *, instance: bool) -> Any:
    module, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def plant(hole: str) -> None:
    if hole == "names":
        objects.resolve = imports_and_calls
    elif hole == "sizes":
        bounds.Bounds._probe = lambda *arguments: None  # type: ignore[method-assign]


def main() -> None:
    folder = Path(sys.argv[1])
    plant(sys.argv[2] if len(sys.argv) > 2 else "")
    warnings.simplefilter("ignore")
    os.chdir(folder)
    for path in sorted(folder.glob("good*")):  # imports what it needs
        load(path)
    handler_bait.called.clear()
    sys.addaudithook(hook)
    hostile_child.CALLS = {"load": load}
    for path in sorted(folder.iterdir()):
        found = hostile_child.attempt("load", path)
        found["forbidden"] += handler_bait.called
        handler_bait.called.clear()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
