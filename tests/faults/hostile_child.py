"""Opens hostile checkpoints under an audit hook, and prints as JSON what each of them did."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import shardckpt
from shardckpt import errors

FORBIDDEN = (
    "pickle.", "marshal.", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "subprocess.", "socket.", "ctypes.dlopen", "os.remove", "os.rename", "os.mkdir", "os.chmod",
    "os.link", "os.symlink", "os.truncate", "shutil.",
)  # fmt: skip
SOURCES = (".py", ".pyc", ".so")

seen: list[str] = []
watched: Path | None = None


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if watched is None:
        return
    if event.startswith(FORBIDDEN):
        seen.append(f"{event} {arguments!r}"[:200])
    if event == "open" and not allowed(arguments[0]):
        seen.append(f"open {arguments[0]!r}")


def allowed(path: Any) -> bool:
    """Whether a file may be opened: one of the checkpoint, or Python's own."""
    if isinstance(path, int):
        return True
    text = os.fsdecode(path)
    if "/" not in text:  # below the checkpoint's own descriptor
        return text not in ("", "..")
    return Path(text) == watched or text.endswith(SOURCES) or text.startswith("/proc/")


def memory(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) << 10


def load(path: Path) -> None:
    shardckpt.load_state(path)


def load_in_place(path: Path) -> None:
    shardckpt.load({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.int8), "n": 0}, path)


def map_it(path: Path) -> None:
    found = shardckpt.load_state(path, device_map="disk")
    found["a"].sum()


def verify(path: Path) -> None:
    with shardckpt.open_checkpoint(path) as opened:
        opened.verify()


def cut(path: Path) -> None:
    """Alone of all this does not read the whole manifest, and may be right about its part of it."""
    with shardckpt.open_checkpoint(path) as opened:
        tensor = opened["a"]
        assert tensor[0:1].shape == (1, *tensor.shape[1:])


CALLS: dict[str, Callable[[Path], None]] = {
    "load": load, "load_in_place": load_in_place, "map": map_it, "verify": verify, "cut": cut,
}  # fmt: skip


def attempt(call: str, path: Path) -> dict[str, Any]:
    """What a call did: its error, seconds of processor time, bytes of memory, forbidden events."""
    global watched
    seen.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = memory("VmRSS"), time.process_time()
    signal.alarm(30)
    watched = path
    error: BaseException | None = None
    try:
        CALLS[call](path)
    except BaseException as caught:
        error = caught
    watched = None
    signal.alarm(0)
    return {
        "case": path.name,
        "call": call,
        "error": type(error).__name__ if error else None,
        "typed": isinstance(error, errors.ShardckptError),
        "text": str(error)[:300],
        "path": getattr(error, "path", None),
        "remedy": getattr(error, "remedy", None),
        "seconds": time.process_time() - begun,
        "peak_bytes": memory("VmHWM") - before,
        "forbidden": list(seen),
    }


def main() -> None:
    folder, *calls = Path(sys.argv[1]), *sys.argv[2:]
    cases = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.endswith("json")
    )
    sys.addaudithook(hook)
    good = folder / "good"
    for call in CALLS:  # imports what it needs
        CALLS[call](good)
    for path in cases:
        for call in calls:
            print(json.dumps(attempt(call, path)), flush=True)


if __name__ == "__main__":
    main()
