"""A replacing save under strace, which kills it or fails it at its k-th system call."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

import shardckpt
from shardckpt import errors
from tests.faults.crash import state_of
from tests.faults.kills import forked, newest

CALLS = (
    "openat,pwrite64,fsync,rename,renameat2,mkdir,fallocate,ftruncate,unlink,rmdir,flock,fstat,"
    "newfstatat,getdents64,fcntl"  # no close: a close that strace fails has closed nothing
)
CODES = ["EIO", "ENOSPC", "EDQUOT", "EINTR", "EMFILE", "EROFS"]
FAULTS = ["signal=SIGKILL", "retval=1"] + [f"error={code}" for code in CODES]
SAVED, REFUSED, UNTYPED = 0, 3, 4
HANGS_S = 60.0
MOST_CALLS = 16  # strace counts the calls of each thread and kind by themselves


def available() -> bool:
    return shutil.which("strace") is not None


def save(folder: str, go: int, done: int) -> None:
    """Wait for a byte, save version 2, tell so, and exit with what came of it once allowed."""
    os.read(go, 1)
    try:
        shardckpt.save(state_of(2), f"{folder}/c", overwrite=True)
        code = SAVED
    except errors.StorageError as error:
        code = REFUSED if error.errno and error.remedy and error.path else UNTYPED
    except errors.ShardckptError:
        code = REFUSED
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = UNTYPED
    os.write(done, b"x")
    os.read(go, 1)
    os._exit(code)


def attempt(fault: str, when: str) -> bool:
    """A replacing save with a fault at call number `when` ("3", or "3+" for ever); whether the
    fault was met."""
    calls = "pwrite64" if fault == "retval=1" else CALLS
    with tempfile.TemporaryDirectory() as folder:
        shardckpt.save(state_of(1), f"{folder}/c")
        (go, let), (told, done) = os.pipe(), os.pipe()
        child = forked(lambda: save(folder, go, done))
        os.close(go)
        os.close(done)
        log = f"{folder}.strace"
        inject = f"-einject={calls}:{fault}:when={when}"
        tracer = subprocess.Popen(
            ["strace", "-f", "-q", "-o", log, "-p", str(child), f"-etrace={calls}", inject],
            stderr=subprocess.DEVNULL,
        )
        give_up_at = time.monotonic() + 60
        while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
            assert time.monotonic() < give_up_at, "strace does not attach"
            time.sleep(0.002)
        before = len(os.listdir(f"/proc/{child}/fd"))
        os.write(let, b"x")
        ended, _, _ = select.select([told], [], [], HANGS_S)
        if not ended:
            os.kill(child, signal.SIGKILL)
            raise AssertionError(f"{fault} at call {when}: the save hangs")
        if os.read(told, 1):
            opened = len(os.listdir(f"/proc/{child}/fd")) - before
            assert not opened, f"{fault} at call {when}: {opened} descriptors stay open"
        with suppress(BrokenPipeError):
            os.write(let, b"x")
        os.close(let)
        os.close(told)
        _, status = os.waitpid(child, 0)
        tracer.wait(timeout=60)
        trace = Path(log).read_text()
        os.unlink(log)
        _check(folder, fault, when, status)
    return "INJECTED" in trace or "killed by SIGKILL" in trace


def _check(folder: str, fault: str, when: str, status: int) -> None:
    what = f"{fault} at call {when}: "
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    expected = (SAVED, -signal.SIGKILL) if "SIGKILL" in fault else (SAVED, REFUSED)
    assert code in expected, what + f"exit code {code}"
    try:
        found = newest(folder)
    except (errors.CorruptionError, errors.NotACheckpointError):
        assert fault == "retval=1", what + "a damaged checkpoint"  # a write that lied
        found = 2
    assert found in ((2,) if code == SAVED else (1, 2)), what + f"version {found} loads"
    shardckpt.save(state_of(3), f"{folder}/c", overwrite=True)
    assert newest(folder) == 3
    assert os.listdir(folder) == ["c"], what + f"leftovers: {os.listdir(folder)}"


def variants() -> list[tuple[str, str]]:
    """Every fault at every call, once, and errors for ever."""
    found = []
    for fault in FAULTS:
        most = 4 if fault == "retval=1" else MOST_CALLS
        found += [(fault, str(at)) for at in range(1, most)]
        # Python itself makes a call again that was interrupted, for ever if it must.
        if fault.startswith("error") and fault != "error=EINTR":
            found += [(fault, f"{at}+") for at in range(1, most)]
    return found


def main() -> int:
    """Some of the variants: from which one on, and how far apart they are."""
    torch.set_num_threads(1)
    first, step = map(int, sys.argv[1:3])
    shardckpt.save(state_of(1), f"{tempfile.mkdtemp()}/c")  # imports all that a save needs
    tried = [attempt(*variant) for variant in variants()[first::step]]
    print(f"{len(tried)} variants, {sum(tried)} of them met")
    return 0


def trial(seed: int) -> int:
    """A slice of all variants: 40 successive seeds try every one of them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.syscalls", str(seed % 40), "40"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return len(variants()[seed % 40 :: 40])


assert all(hasattr(errno, code) for code in CODES)

if __name__ == "__main__":
    sys.exit(main())
