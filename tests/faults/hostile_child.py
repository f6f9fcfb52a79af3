"""Opens hostile checkpoints under an audit hook, and prints as JSON what each of them did.

Everything is imported, and every reader has opened an intact checkpoint of each format. Then a
child is forked that opens the hostile ones. If it dies, the result says so, and another child
continues with the next checkpoint.
"""

from __future__ import annotations

import contextlib
import encodings.cp437  # noqa: F401 - zipfile imports it for names that are not UTF-8
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.api import rescue
from shardckpt.cli.main import main as command
from shardckpt.convert.convert import convert
from shardckpt.convert.formats import FORMATS
from shardckpt.maintenance.reshard import reshard
from shardckpt.storage.local import LocalStorage
from tests.faults.hostile_holes import HOLES

FORBIDDEN = (
    "pickle.", "marshal.", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "subprocess.", "socket.", "ctypes.dlopen", "import",
)  # fmt: skip
CHANGES = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink",
    "os.truncate", "shutil.",
)  # fmt: skip
SOURCES = (".py", ".pyc", ".so")
FOLDER_S = 60  # a machine may have other work to do
HOLE_S = 3
HOLE_CPU_S = 1.2  # more than an attempt may take
MOST_ADDRESSES = 1 << 30  # beyond what is taken before; threads and allocators reserve some


class Proxy:
    """As lazy objects have it: to ask what it is calls code."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        seen.append("a proxy's __class__")
        return type


proxy = Proxy()
seen: list[str] = []
watched: Path | None = None
output: Path | None = None


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if watched is None:
        return
    if event.startswith(FORBIDDEN):
        seen.append(f"{event} {arguments!r}"[:200])
    if event.startswith(CHANGES) and not written(arguments):
        seen.append(f"{event} {arguments!r}"[:200])
    if event == "open" and not allowed(*arguments):
        seen.append(f"open {arguments[0]!r}")


def written(arguments: tuple[Any, ...]) -> bool:
    """Whether a change is one of what a call writes, and of nothing else."""
    names = [os.fsdecode(one) for one in arguments if isinstance(one, (str, bytes))]
    return all("/" not in name or _within(name, output) for name in names)


def allowed(path: Any, mode: Any = None, flags: Any = 0) -> bool:
    """Whether a file may be opened: one of the checkpoint, of what is written, or Python's own."""
    if isinstance(path, int) or (flags or 0) & os.O_DIRECTORY:  # refused for all else, unopened
        return True
    text = os.fsdecode(path)
    if "/" not in text:  # below the checkpoint's own descriptor
        return text not in ("", "..")
    if text.endswith(SOURCES) or text.startswith(("/proc/", "/sys/")):
        return True
    home = watched.parents[1] if watched.parent.name == "snapshots" else watched  # the hub's cache
    return _within(text, home) or _within(text, output) or Path(text) == output.parent


def _within(text: str, folder: Path | None) -> bool:
    real = os.path.realpath(text)
    return folder is not None and (real == str(folder) or real.startswith(f"{folder}/"))


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


class Small(nn.Module):
    """The model of which the checkpoints have the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("a", nn.Parameter(torch.zeros(2, 3)))


HANDLER: list[NNHandler] = []


def initialize(path: Path) -> None:
    NNHandler.initialize_from_checkpoint(path, Small, strict=False)


def restore(path: Path) -> None:
    HANDLER[0].restore(path)


def convert_to(kind: Any) -> Callable[[Path], None]:
    suffix = {"safetensors": ".safetensors", "torch": ".pth"}.get(kind, "")
    return lambda path: convert(str(path), f"{output}/out{suffix}", to=kind, keys=["a"])


def rescue_it(path: Path) -> None:
    rescue(str(path), f"{output}/out", storage=LocalStorage())


def reshard_it(path: Path) -> None:
    with shardckpt.open_checkpoint(path) as opened:
        reshard(opened, f"{output}/out", shards=2, storage=LocalStorage())


def run(*words: str) -> Callable[[Path], None]:
    """Run a command of the command line. Its output takes the place of an error."""

    def call(path: Path) -> None:
        said = io.StringIO()
        given = [{"PATH": str(path), "OUT": f"{output}/out"}.get(word, word) for word in words]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = command(given)
        if code:
            known = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
            kind = errors.ShardckptError if code in known else RuntimeError
            raise kind(said.getvalue(), path=path, remedy=said.getvalue().partition("remedy: ")[2])

    return call


CALLS: dict[str, Callable[[Path], None]] = {
    "load": load,
    "load_in_place": load_in_place,
    "map": map_it,
    "verify": verify,
    "cut": cut,
    "NNHandler.load": NNHandler.load,
    "restore": restore,
    "initialize": initialize,
    **{f"convert to {kind}": convert_to(kind) for kind in FORMATS},
    "rescue": rescue_it,
    "reshard": reshard_it,
    "shardckpt inspect": run("inspect", "PATH"),
    "shardckpt verify": run("verify", "PATH", "--jobs", "1"),
    "shardckpt convert": run("convert", "PATH", "OUT", "--jobs", "1"),
    "shardckpt rescue": run("rescue", "PATH", "OUT"),
    "shardckpt reshard": run("reshard", "PATH", "OUT", "--shards", "1", "--jobs", "1"),
}


def attempt(call: str, path: Path, *, limit_s: int = FOLDER_S) -> dict[str, Any]:
    """The result of a call: error, seconds of processor time, bytes of memory, forbidden events."""
    global watched
    seen.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = memory("VmRSS"), time.process_time()
    signal.alarm(limit_s)
    watched = path
    error: BaseException | None = None
    try:
        CALLS[call](path)
    except BaseException as caught:
        error = caught
    watched = None
    signal.alarm(0)
    return {
        "error": type(error).__name__ if error else None,
        "typed": isinstance(error, errors.ShardckptError),
        "text": str(error)[:300],
        "path": getattr(error, "path", None),
        "remedy": getattr(error, "remedy", None),
        "seconds": time.process_time() - begun,
        "peak_bytes": memory("VmHWM") - before,
        "forbidden": list(seen),
    }


def attempts(jobs: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Return the result of every job, which child processes run."""
    done = 0
    while done < len(jobs):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            with os.fdopen(writer, "w") as told:
                _work(jobs[done:], told)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as told:
            for line in told:
                yield {**jobs[done], **json.loads(line)}
                done += 1
        _, status = os.waitpid(child, 0)
        if status:
            text = f"the process ended, wait status {status:#x}"
            yield {**jobs[done], "error": "death", "text": text, "typed": False, "forbidden": [],
                   "seconds": 0.0, "peak_bytes": 0}  # fmt: skip
            done += 1


def _work(jobs: list[dict[str, Any]], told: Any) -> None:
    assert output is not None
    limit = memory("VmSize") + MOST_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for job in jobs:
        if job.get("hole"):
            HOLES[job["hole"]]()
            signal.setitimer(signal.ITIMER_PROF, HOLE_CPU_S)
        limit_s = HOLE_S if job.get("hole") else FOLDER_S
        told.write(json.dumps(attempt(job["call"], Path(job["path"]), limit_s=limit_s)) + "\n")
        told.flush()
        for left in output.iterdir():
            (shutil.rmtree if left.is_dir() else os.unlink)(left)
        if job.get("hole"):
            break  # the next one has another child


def main() -> None:
    global output
    folder = Path(sys.argv[1]).resolve()
    output = folder / "output"
    output.mkdir()
    plan = json.loads((folder / "plan.json").read_text())
    handler = NNHandler(Small)
    HANDLER.append(handler)
    handler.save(folder / "handler")
    handler.restore(folder / "handler")
    sys.addaudithook(hook)
    for job in plan["warm"]:  # imports what it needs, errors included
        attempt(job["call"], Path(job["path"]))
        for left in output.iterdir():
            (shutil.rmtree if left.is_dir() else os.unlink)(left)
    for found in attempts(plan["jobs"]):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
