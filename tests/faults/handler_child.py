"""Loads hostile checkpoints of a handler under an audit hook, and prints as JSON what each did:
every call with every one of them.

python -m tests.faults.handler_child FOLDER [PLANT]; a planted hole must be seen by the test.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from subprocess import run as alias  # noqa: F401  a name of this script that a checkpoint gives
from typing import Any

from torch import nn

from shardckpt import NNHandler
from shardckpt.convert.convert import convert
from shardckpt.nn_handler import bounds, objects
from tests.faults import handler_bait, hostile_child
from tests.faults.handler_attacks import base

EVERY = 5  # of so many checkpoints one is opened by each call, the others are loaded


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


def restore(path: Path) -> None:
    base().restore(path)


def initialize(path: Path) -> None:
    NNHandler.initialize_from_checkpoint(path, nn.Linear, "cpu", in_features=2, out_features=2)


CALLS = {
    "load": load,
    "restore": restore,
    "initialize": initialize,
    "shardckpt convert": hostile_child.CALLS["shardckpt convert"],
    "convert to torch": lambda path: convert(path, f"{hostile_child.output}/out.pth"),
    "convert to safetensors": lambda path: convert(path, f"{hostile_child.output}/x.safetensors"),
    "convert to dcp": lambda path: convert(path, f"{hostile_child.output}/out", to="dcp"),
}


def imports_and_calls(name: str, slot: Any, *, instance: bool) -> Any:
    module, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def plant(hole: str) -> None:
    if hole == "names":
        objects.resolve_name = imports_and_calls
    elif hole == "sizes":
        bounds.Bounds._probe = lambda *arguments: None  # type: ignore[method-assign]


def attempt(call: str, path: Path) -> dict[str, Any]:
    found = {"call": call, "case": path.name, **hostile_child.attempt(call, path)}
    found["forbidden"] += handler_bait.called
    handler_bait.called.clear()
    clear_output()
    return found


def clear_output() -> None:
    for left in hostile_child.output.iterdir():
        (shutil.rmtree if left.is_dir() else os.unlink)(left)


def main() -> None:
    folder = Path(sys.argv[1])
    plant(sys.argv[2] if len(sys.argv) > 2 else "")
    warnings.simplefilter("ignore")
    os.chdir(folder)
    paths = sorted(folder.iterdir())
    hostile_child.output = folder.parent / f"{folder.name}-output"
    hostile_child.output.mkdir()
    hostile_child.CALLS = CALLS
    for path in folder.glob("good*"):  # imports what it needs
        for call in CALLS.values():
            call(path)
            clear_output()
    handler_bait.called.clear()
    sys.addaudithook(hook)
    for number, path in enumerate(paths):
        for call in CALLS if number % EVERY == 0 else ["load"]:
            print(json.dumps(attempt(call, path)), flush=True)


if __name__ == "__main__":
    main()
