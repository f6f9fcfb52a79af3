"""One error for all entries that can't be saved."""

from __future__ import annotations

from shardckpt.errors import StateError, UnsupportedLeafError
from shardckpt.state.refusals import all_refused


def error(name, kind=UnsupportedLeafError):
    return kind(
        "No such leaf", tensor=name, expected="e", actual=f"at {name}", remedy=f"fix {name}"
    )


def test_a_single_error_is_raised_unchanged():
    one = error("a")
    assert all_refused([one]) is one


def test_several_errors_become_one_of_the_type_of_the_first():
    made = all_refused([error("a"), error("b", StateError)])
    assert type(made) is UnsupportedLeafError
    assert (made.tensor, made.expected, made.actual, made.remedy) == ("a", "e", "at a", "fix a")
    head, *lines = made.message.splitlines()
    assert head == "No such leaf; 2 entries of the state can't be saved:"
    assert [line.strip() for line in lines] == ["a: at a: fix a", "b: at b: fix b"]


def test_twenty_entries_are_listed_and_the_others_counted():
    lines = all_refused([error(f"e{n}") for n in range(23)]).message.splitlines()
    assert len(lines) == 22
    assert lines[-1].strip() == "and 3 more"
    assert "and" not in all_refused([error(f"e{n}") for n in range(20)]).message.splitlines()[-1]
