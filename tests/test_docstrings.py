"""Public docstrings have their sections, and their examples run."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import shardckpt
from shardckpt import nn_handler
from shardckpt.nn_handler.components import Components
from shardckpt.nn_handler.training_state import TrainingState

PUBLIC = {
    **{name: getattr(shardckpt, name) for name in shardckpt.__all__ if name != "__version__"},
    **{name: getattr(nn_handler, name) for name in nn_handler.__all__},
}
NAMES = sorted(PUBLIC)
COLLECTIVE_OR_NOT = {"CheckpointManager", "NNHandler", "SaveHandle"}
"""Classes of which every method says whether it is collective."""


def sections(text: str) -> set[str]:
    return set(re.findall(r"^\s*(Args|Attributes|Returns|Yields|Raises|Example):$", text, re.M))


def parameters(function: Callable[..., Any]) -> list[str]:
    names = inspect.signature(function).parameters
    return [name for name in names if name not in ("self", "cls")]


def raises(function: Any) -> bool:
    """Whether there is a raise statement in the function's own body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    return any(isinstance(node, ast.Raise) and node.exc for node in ast.walk(tree))


def documented(text: str, name: str) -> bool:
    return re.search(rf"^\s+\*{{0,2}}{name}: ", text, re.M) is not None


def lacking_in_function(function: Any, text: str, where: str) -> list[str]:
    """The sections that the docstring of a function lacks."""
    present = sections(text)
    lacking = [f"Args: {name}" for name in parameters(function) if not documented(text, name)]
    returned = inspect.signature(function).return_annotation
    generator = inspect.isgeneratorfunction(inspect.unwrap(function))
    if returned not in (None, "None") and not generator and "Returns" not in present:
        lacking.append("Returns")
    if raises(function) and "Raises" not in present:
        lacking.append("Raises")
    return [f"{where}: {one}" for one in lacking]


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods that a class of the package, or one of its bases in it, defines."""
    for base in cls.__mro__ if cls is shardckpt.NNHandler else (cls,):
        for name, member in vars(base).items() if base is not object else ():
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member) and not name.startswith("_"):
                yield name, member


def lacking_in_class(cls: type, text: str) -> list[str]:
    own_init = cls.__init__ if cls is shardckpt.NNHandler else vars(cls).get("__init__")
    if dataclasses.is_dataclass(cls) and own_init is not shardckpt.NNHandler.__init__:
        names = [field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")]
    else:
        names = parameters(own_init) if own_init else []
    lacking = [f"{cls.__name__}: {name}" for name in names if not documented(text, name)]
    for name, method in members(cls):
        where = f"{cls.__name__}.{name}"
        about = inspect.getdoc(method) or ""
        if about.startswith("Internal. "):
            continue
        if not about.startswith("See "):  # where the interface describes it
            lacking += lacking_in_function(method, about, where)
        if cls.__name__ in COLLECTIVE_OR_NOT and "ollective" not in about:
            lacking.append(f"{where}: collective or not")
    return lacking


def lacking(name: str, thing: Any) -> list[str]:
    text = inspect.getdoc(thing) or ""
    found = [] if "Example" in sections(text) else [f"{name}: Example"]
    if inspect.isclass(thing):
        return found + lacking_in_class(thing, text)
    if "ollective" not in text:
        found.append(f"{name}: collective or not")
    return found + lacking_in_function(thing, text, name)


def is_error(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Exception)


@pytest.mark.parametrize("name", [n for n, thing in PUBLIC.items() if not is_error(thing)])
def test_a_public_docstring_has_its_sections(name):
    assert lacking(name, PUBLIC[name]) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_public_name_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    things = [PUBLIC[name], *([Components, TrainingState] if name == "NNHandler" else [])]
    for test in (
        t for thing in things for t in doctest.DocTestFinder().find(thing, name, globs={})
    ):
        output: list[str] = []
        runner.run(test, out=output.append)
        assert runner.summarize(verbose=False).failed == 0, "".join(output)


def test_a_docstring_without_sections_would_be_seen():
    def load(path: str, strict: bool) -> int:
        """Load.

        Args:
            path: The path.
        """
        raise ValueError(path)

    assert lacking("load", load) == [
        "load: Example",
        "load: collective or not",
        "load: Args: strict",
        "load: Returns",
        "load: Raises",
    ]


def test_a_wrong_example_would_be_seen():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1
