"""Explain why torch.load(weights_only=True) refused a file, as a typed error.

torch.load raises pickle.UnpicklingError for corrupted files, for malicious files, and for intact
files that hold objects. Users need to distinguish them. Tested with the messages of torch 2.13.
"""

from __future__ import annotations

import re

from shardckpt.errors import CheckpointError, CorruptionError, NotACheckpointError

__all__ = ["is_harmful", "malicious", "plain_text", "refusal", "refused_name", "wrong_container"]

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NEWER_PROTOCOLS = {"149", "67"}  # FRAME and SHORT_BINBYTES, which begin protocols 4 and 3


_MADE_TO_DO_HARM = (
    "This file is malicious: it calls a function of the operating system",
    "don't load it with pickle either; ask its author for a file of only tensors",
)
_HARMFUL = re.compile(
    r"(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__|breakpoint|input)"
    r"|(os|posix|nt|sys|subprocess|commands|pty|shutil|socket|ctypes|importlib|runpy|webbrowser"
    r"|torch\.hub|torch\.utils\.cpp_extension)(\.\w+)*\.\w+"
)


def is_harmful(name: str) -> bool:
    """Whether a function starts programs, runs code or opens files, as no saved state does."""
    return _HARMFUL.fullmatch(name) is not None


def malicious(path: str, name: str, *, tensor: str | None = None) -> CorruptionError:
    """Return the typed error for a file that calls a harmful function."""
    message, remedy = _MADE_TO_DO_HARM
    return CorruptionError(
        message, path=path, tensor=tensor, actual=f"a call of {name}", remedy=remedy
    )


def plain_text(error: BaseException) -> str:
    """Return the line of an error message that has the reason, without terminal codes."""
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines()]
    if len(lines) > 1 and lines[0].startswith("Weights only load failed"):
        reasons = [line for line in lines if re.match(r"WeightsUnpickler error: \S", line)]
        lines = reasons or [
            line for line in lines[1:] if line and not line.startswith("Please file")
        ]
    return lines[0] if lines else ""


def refused_name(error: BaseException) -> str | None:
    """Return the full name of the class or function that torch.load refused, or None."""
    found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if found is None:
        return None
    return found[1] if "." in found[1] else f"builtins.{found[1]}"


def wrong_container(error: BaseException) -> tuple[str, str] | None:
    """Return the container that a file fills, "dict" or "list", and the name of its class, or
    None.
    """
    pattern = r"Can only (SETITEMS?|append|extend)\b.*but got <class '([^']+)'>"
    found = re.search(pattern, str(error))
    return found and ("dict" if found[1].startswith("SET") else "list", found[2])


def refusal(path: str, error: BaseException, *, tensor: str | None = None) -> CheckpointError:
    """Return the typed error for a file, or one entry of it, that torch.load refused."""
    text = str(error)
    error_type: type[CheckpointError] = NotACheckpointError
    name = refused_name(error)
    if name and is_harmful(name):
        return malicious(path, name, tensor=tensor)
    if name:
        message = "This file holds objects of classes, which only unpickling could read"
        actual = f"an object of {name}"
        remedy = (
            f"`shardckpt convert {path} TARGET` takes the tensors and values and lists the objects;"
            " or save the state_dict() of the object where its class is known"
        )
    elif "Trying to call reduce for unrecognized function" in text:
        message = "This file holds objects of classes, which only unpickling could read"
        actual = "an object made by a function that the file makes itself, as a bound method"
        remedy = "save it again where you trust it, with tensors and plain values alone"
    elif found := re.search(r"unsupported GLOBAL (\S+) whose module \S+ is blocked", text):
        return malicious(path, found[1], tensor=tensor)
    elif (operand := re.search(r"Unsupported operand (\d+)", text)) and (
        operand[1] in _NEWER_PROTOCOLS
    ):
        message = "This file was saved with a newer pickle protocol than torch.load reads safely"
        actual = "pickle_protocol=3 or above"
        remedy = "save it again where you trust it: torch.save(state, path), without the argument"
    elif "torch.distributed.tensor`` must be imported" in text:
        message = "This file holds DTensors: one rank's part of a sharded state"
        actual = "DTensors"
        remedy = "save the state on all ranks: shardckpt.save, or torch.distributed.checkpoint.save"
    elif "TorchScript" in text:
        message, actual = "This is a TorchScript archive, a program and its weights", "TorchScript"
        remedy = "save its weights: torch.save(torch.jit.load(path).state_dict(), new_path)"
    elif "legacy .tar format" in text:
        message, actual = "This file has the tar format of torch before 0.1.10", "legacy .tar"
        remedy = "load it where you trust it, weights_only=False, and save it again with torch.save"
    else:
        error_type, actual = CorruptionError, f"{type(error).__name__}: {plain_text(error)}"
        message = "This file can't be read"
        remedy = "load another checkpoint; pickled objects are never loaded"
    return error_type(message, path=path, tensor=tensor, actual=actual, remedy=remedy)
