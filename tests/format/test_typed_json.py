"""Values survive typed JSON, and JSON that no encoder writes is refused."""

from __future__ import annotations

import collections
import enum
import json
import math
import pathlib

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardckpt import errors
from shardckpt.format import typed_json as values
from shardckpt.format.typed_json import TensorRef


class Mode(enum.Flag):
    READ = 1
    WRITE = 2


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None))
    | st.sampled_from([Mode.READ, Mode.READ | Mode.WRITE, Mode(0), collections.Counter("aab")])
    | st.sampled_from([collections.deque([1, (2,)], 3), collections.deque()])
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.sampled_from([torch.bfloat16, torch.Size([2, 3]), slice(1, None, 2), range(3), -0.0])
    | st.sampled_from([pathlib.Path("a/b"), torch.device("cpu"), np.float32(1.5), bytearray(2)])
)
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.sets(st.integers() | st.text())
        | st.frozensets(st.binary())
    ),
    max_leaves=20,
)


def there_and_back(value):
    text = msgspec.json.encode(values.encode(value, at="x"))
    json.loads(text)  # any reader of JSON takes it
    return values.decode(msgspec.json.decode(text), tensor=lambda ref: ref)


def same(a, b):
    """Equal, and of the same types all the way down (1, 1.0 and True differ)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True) if len(a) == len(b) else [((1, 1), (2, 2))]
        return all(same(k, q) and same(v, w) for (k, v), (q, w) in pairs)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and str(a) == str(b) if isinstance(a, float) else a == b


@given(TREES)
def test_values_survive_encoding(value):
    assert same(there_and_back(value), value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_floats_that_json_lacks(number):
    assert str(there_and_back(number)) == str(number)


def test_nan_keeps_its_bits():
    odd = np.frombuffer(bytes.fromhex("7ff4000000000123"), ">f8")[0].item()
    assert np.array(there_and_back(odd)).tobytes() == np.array(odd).tobytes()


def test_references_are_decoded_by_the_caller():
    for kind in ("tensor", "numpy", "per_rank"):
        assert there_and_back([TensorRef("a.b", kind)]) == [TensorRef("a.b", kind)]


def test_a_set_is_written_the_same_way_each_time():
    assert values.encode({"b", "a", "c"}, at="") == {"$set": ["a", "b", "c"]}


@pytest.mark.parametrize(
    "node",
    [
        {"$unknown": 1},
        {"$tuple": 3},
        {"$tuple": [], "x": 1},
        {"$dict": [[1, 2], [1, 3]]},
        {"$dict": [[[], 2]]},
        {"$int": "x"},
        {"$int": "9" * 5000},
        {"$float": "7ff8"},
        {"$float": "zz"},
        {"$bytes": "*"},
        {"$complex": [1.0]},
        {"$dtype": "nn"},
        {"$dtype": "no_such"},
        {"$device": "nowhere"},
        {"$size": ["a"]},
        {"$slice": [1]},
        {"$range": [1, 2, 0]},
        {"$set": [[]]},
        {"$numpy": ["O", ""]},
        {"$numpy": ["<f8", "AAAA"]},
        {"$tensor": 3},
        {"$enum": ["os", "system"]},
        {"$str": "ff"},
        {"$counter": [["a"]]},
        {"$deque": [-1, []]},
        {"$deque": ["3", []]},
    ],
    ids=json.dumps,
)
def test_malformed_nodes_are_refused(node):
    with pytest.raises(errors.CheckpointError):
        values.decode({"deep": [node]}, tensor=lambda ref: ref)


def test_an_enum_that_is_no_enum_is_not_called():
    for target in (["os", "system", "x"], ["builtins", "print", "x"], ["nowhere", "E", "A"]):
        with pytest.raises(errors.CheckpointError):
            values.decode({"$enum": target}, tensor=lambda ref: ref)


def test_an_enum_that_could_not_be_found_again():
    class Local(enum.Enum):
        A = 1

    with pytest.raises(errors.UnsupportedLeafError) as caught:
        values.encode({"e": Local.A}, at="")
    assert caught.value.tensor == "e"


def test_a_deque_keeps_its_length():
    assert there_and_back(collections.deque([1, 2], 2)).maxlen == 2


def test_an_unknown_type_is_named_with_its_path():
    with pytest.raises(errors.UnsupportedLeafError) as caught:
        values.encode({"a": [1, {"b": object()}]}, at="state")
    assert caught.value.tensor == "state.a.1.b"
    assert caught.value.actual == "builtins.object"


@pytest.mark.parametrize("code", ["9" * 5000, "007", "<f4,<i4", "(2,)f4", "float32", "|V8", "|O8"])
def test_a_dtype_that_numpy_would_parse_as_python(code):
    with pytest.raises(errors.CorruptionError):
        values.decode({"$numpy": [code, "AACAPw=="]}, tensor=lambda ref: ref)
