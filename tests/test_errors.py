"""The exceptions: their tree, their facts in words, their way through pickle, their exit codes."""

from __future__ import annotations

import pickle
import re

import pytest

from shardckpt import errors

EXIT_CODES = {
    "ShardckptError": 1,
    "StateError": 3,
    "LoadMismatchError": 4,
    "CheckpointError": 5,
    "CorruptionError": 6,
    "StorageError": 7,
    "CoordinationError": 8,
    "DependencyError": 9,
}
BUILTINS = {
    "StateError": ValueError,
    "UnsupportedLeafError": TypeError,
    "LoadMismatchError": ValueError,
    "CheckpointError": ValueError,
    "CheckpointNotFoundError": FileNotFoundError,
    "StorageError": OSError,
    "CheckpointExistsError": FileExistsError,
    "CheckpointBusyError": BlockingIOError,
    "StoragePermissionError": PermissionError,
    "StalledError": TimeoutError,
    "CoordinationError": RuntimeError,
    "DependencyError": ImportError,
}
CLASSES = [getattr(errors, name) for name in errors.__all__]


def test_all_are_listed():
    defined = [
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, Exception)
    ]
    assert sorted(defined) == errors.__all__


def test_the_tree_is_as_drawn():
    """The drawing at the top of the module names each class below its parent."""
    above: list[str] = []
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"[ │├└─]*?(\w+Error)(?:\((\w+)\))?", line)
        if found and line.startswith("    "):
            depth = (found.start(1) - 4) // 4
            above = [*above[:depth], found[1]]
            drawn[found[1]] = above[-2] if depth else "Exception"
            if found[2] and depth:
                builtins = {base.__name__ for base in getattr(errors, found[1]).__mro__}
                assert found[2] in builtins, line
    assert drawn == {cls.__name__: cls.__mro__[1].__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES)
def test_facts_in_words_and_through_pickle(cls):
    error = cls(
        "It broke", path="/p", rank=3, tensor="w", expected=1, actual=2, remedy="mend it", phase="x"
    )
    lines = str(error).splitlines()
    assert lines == [
        "It broke",
        "  path: /p",
        "  rank: 3",
        "  tensor: w",
        "  expected: 1",
        "  actual: 2",
        "  phase: x",
        "  remedy: mend it",
    ]
    error.added = "later"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert again.added == "later"
    assert str(again) == str(error)
    assert (again.path, again.rank, again.tensor) == ("/p", 3, "w")
    assert (again.expected, again.actual, again.remedy) == (1, 2, "mend it")
    assert again.facts == {"phase": "x"}
    assert again.args == ("It broke",)


@pytest.mark.parametrize("cls", CLASSES)
def test_absent_facts_are_not_in_the_message(cls):
    error = cls("It broke")
    assert str(error) == "It broke"
    assert (error.path, error.rank, error.tensor, error.expected) == (None,) * 4
    assert (error.actual, error.remedy, error.facts) == (None, None, {})


@pytest.mark.parametrize("cls", CLASSES)
def test_exit_codes_and_builtins(cls):
    family = next(base for base in cls.__mro__ if base.__name__ in EXIT_CODES)
    assert cls.exit_code == EXIT_CODES[family.__name__]
    for base in cls.__mro__:
        if base.__name__ in BUILTINS:
            assert issubclass(cls, BUILTINS[base.__name__])
    assert issubclass(cls, Exception)


def test_errno_of_storage_errors():
    error = errors.NoSpaceError("full", errno=28, path="/p")
    assert error.errno == 28
    again = pickle.loads(pickle.dumps(error))
    assert (again.errno, again.path) == (28, "/p")
    assert errors.StorageError("odd").errno is None


def test_the_entries_of_a_mismatch_are_attributes():
    error = errors.LoadMismatchError("message", wrong_shape=(("weight", [4], [3]),))
    assert error.wrong_shape == (("weight", [4], [3]),)
    assert error.missing is None
    again = pickle.loads(pickle.dumps(error))
    assert again.wrong_shape == error.wrong_shape


def test_ranks_are_listed_without_brackets():
    assert "\n  rank: 0\n" in f"{errors.StateError('m', rank=(0,))}\n"
    assert "\n  rank: 1, 3\n" in f"{errors.StateError('m', rank=(1, 3))}\n"
    assert "\n  rank: 2\n" in f"{errors.StateError('m', rank=2)}\n"


def test_a_line_end_in_a_name_does_not_make_another_fact():
    text = str(errors.StateError("Bad", path="run\n  remedy: none", tensor="w\n  path: x"))
    assert text.splitlines() == ["Bad", r"  path: run\n  remedy: none", r"  tensor: w\n  path: x"]


def test_a_line_end_in_a_fact_begins_no_other_fact():
    error = errors.StateError("wrong", actual="name\n  remedy: delete it", remedy="rename")
    assert str(error).splitlines() == [
        "wrong",
        "  actual: name",
        "      remedy: delete it",
        "  remedy: rename",
    ]
