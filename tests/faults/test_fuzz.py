"""Any bytes and any JSON as manifest and as header raise only ShardckptError."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import fuzz

TEXT = st.text(alphabet='az09.$[]:,-_\\"\0\ud800é\u1234', max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(fuzz.TEXTS),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXT | st.sampled_from(fuzz.TAGS), inner, max_size=3)
    ),
    max_leaves=12,
)
QUICK = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
MEMBERS = st.sampled_from([*json.loads(fuzz.VALID_MANIFEST), "more"])


@QUICK
@given(st.dictionaries(MEMBERS, JSON, max_size=3))
def test_manifests_with_other_members(members):
    document = {**json.loads(fuzz.VALID_MANIFEST), **members}
    fuzz.attempt(fuzz.parse_manifest, fuzz.seal(document))


@QUICK
@given(JSON)
def test_any_typed_json_is_read_or_refused(state):
    document = {**json.loads(fuzz.VALID_MANIFEST), "state": state}
    fuzz.attempt(fuzz.parse_manifest, fuzz.seal(document))


@QUICK
@given(st.dictionaries(TEXT | st.sampled_from(["w", "__metadata__"]), JSON, max_size=3))
def test_any_header_is_read_or_refused(header):
    fuzz.attempt(fuzz.parse_shard, fuzz.pack_header(header))


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    for parse, _, _ in fuzz.TARGETS.values():
        fuzz.attempt(parse, data)


def test_ranks_that_accept_what_one_rank_refuses_would_be_seen(monkeypatch):
    """A planted fault: no rank checks a long list."""
    monkeypatch.setattr(fuzz.divided, "_own", lambda long, rank, world_size: [])
    monkeypatch.setattr(fuzz, "_read_all", lambda entry: None)
    with pytest.raises(AssertionError, match="two ranks accept"):
        for seed in range(20):
            fuzz.trial_of("large", seed)


@pytest.mark.parametrize("inputs", [500, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_documents_with_changes(target, inputs, monkeypatch):
    monkeypatch.setattr(fuzz, "INPUTS_A_TRIAL", inputs)
    fuzz.trial_of(target, 1)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_what_escapes_would_be_seen(target, monkeypatch):
    """A planted fault: a parser that lets an error of Python through."""
    parse, make, valid = fuzz.TARGETS[target]

    def leaky(data):
        if b'"F64"' in data and data != valid:
            raise KeyError("planted")
        parse(data)

    monkeypatch.setitem(fuzz.TARGETS, target, (leaky, make, valid))
    with pytest.raises(AssertionError, match="planted"):
        for seed in range(20):
            fuzz.trial_of(target, seed)
