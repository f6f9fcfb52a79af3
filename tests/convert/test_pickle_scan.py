"""Pickles are checked before they are loaded, and read without importing their classes."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import pytest
import torch

from shardckpt.convert.pickle_scan import Named, PickleStructure, scan


@pytest.mark.parametrize(
    "value", [{"a": [1, (2, 3.5)], "b": {4, 5}}, b"bytes" * 99, "text" * 99, 1 << 100, None, [[[]]]]
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_end_of_a_pickle_is_found_wherever_it_begins(value, protocol):
    data = pickle.dumps(value, protocol=protocol)
    assert scan(data) == len(data)
    assert scan(b"ab" + data + b"more", 2) == 2 + len(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps([1, 2, 3], protocol=2)[:-1], "truncated"),
        (b"\x80\x02r\xff\xff\xff\xff.", "memo index"),
        (b"\x80\x02cos\n" + b"x" * 2000, "a name without an end"),
        (b"\x80\x02" + b"(" * 10_001, "levels of nesting"),
        (b"I1\n.", "opcode"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "truncated"),
        (b"", "truncated"),
    ],
)
def test_a_pickle_that_no_saved_state_needs_is_refused(data, reason):
    with pytest.raises(pickle.UnpicklingError, match=reason):
        scan(data)


class Call:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_stand_in_takes_the_place_of_a_function_and_nothing_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"x": Call()}, protocol=2)
    found = PickleStructure(data, allowed=lambda name: True).load()["x"]
    assert isinstance(found, Named)
    assert found.name.endswith(".mkdir")
    assert found.args == ("owned",)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_allowed_is_refused():
    data = pickle.dumps(Call(), protocol=2)
    with pytest.raises(pickle.UnpicklingError, match="mkdir is not allowed"):
        PickleStructure(data, allowed=lambda name: False).load()


def test_immutable_types_are_read_as_themselves():
    value = {"d": torch.float16, "o": OrderedDict(a=1), "s": torch.Size([2, 3])}
    found = PickleStructure(pickle.dumps(value, protocol=2), allowed=lambda name: True).load()
    assert found["d"] is torch.float16
    assert type(found["o"]) is OrderedDict
    assert tuple(found["s"]) == (2, 3)


def test_data_outside_the_pickle_are_refused_unless_the_caller_has_them():
    data = b"\x80\x02K\x07Q."
    assert PickleStructure(data, allowed=lambda name: True, storage=lambda pid: pid + 1).load() == 8
    with pytest.raises(pickle.UnpicklingError, match="outside the pickle"):
        PickleStructure(data, allowed=lambda name: True).load()
