"""Typed errors that explain why torch.load refused a file."""

from __future__ import annotations

import pickle

import pytest

from shardckpt.convert.refusals import (
    is_harmful,
    plain_text,
    refusal,
    refused_name,
    wrong_container,
)
from shardckpt.errors import CorruptionError, NotACheckpointError


@pytest.mark.parametrize(
    ("name", "harmful"),
    [
        ("os.system", True),
        ("posix.system", True),
        ("builtins.eval", True),
        ("torch.hub.load", True),
        ("subprocess.Popen", True),
        ("builtins.set", False),
        ("my.os.system", False),
        ("torch.nn.Linear", False),
    ],
)
def test_functions_that_run_programs_are_harmful(name, harmful):
    assert is_harmful(name) == harmful


@pytest.mark.parametrize(
    ("text", "kind", "actual"),
    [
        ("GLOBAL os.system was not an allowed global", CorruptionError, "a call of os.system"),
        ("GLOBAL a.B was not an allowed global", NotACheckpointError, "an object of a.B"),
        ("Unsupported operand 149", NotACheckpointError, "pickle_protocol=3 or above"),
        ("Unsupported operand 7", CorruptionError, "UnpicklingError: Unsupported operand 7"),
        ("it is a TorchScript archive", NotACheckpointError, "TorchScript"),
        ("the legacy .tar format", NotACheckpointError, "legacy .tar"),
    ],
)
def test_the_error_says_what_the_file_holds(text, kind, actual):
    error = refusal("x.pt", pickle.UnpicklingError(text), tensor="w")
    assert type(error) is kind
    assert (error.path, error.tensor, error.actual) == ("x.pt", "w", actual)
    assert error.remedy


def test_the_reason_is_the_line_that_has_it_without_terminal_codes():
    text = "Weights only load failed. Use\n\x1b[1mhints\x1b[0m\nWeightsUnpickler error: bad byte\n"
    assert plain_text(RuntimeError(text)) == "WeightsUnpickler error: bad byte"
    assert plain_text(RuntimeError("\x1b[31mred\x1b[0m\nmore")) == "red"
    assert plain_text(RuntimeError("")) == ""


def test_the_refused_name_is_complete():
    assert refused_name(RuntimeError("GLOBAL a.b.C was not an allowed global")) == "a.b.C"
    assert refused_name(RuntimeError("GLOBAL print was not an allowed global")) == "builtins.print"
    assert refused_name(RuntimeError("something else")) is None


def test_a_container_of_a_subclass_is_named():
    text = "Can only SETITEMS for dict, but got <class 'my.Config'>"
    assert wrong_container(RuntimeError(text)) == ("dict", "my.Config")
    text = "Can only append to lists, but got <class 'my.Steps'>"
    assert wrong_container(RuntimeError(text)) == ("list", "my.Steps")
    assert wrong_container(RuntimeError("other")) is None
