"""Checkpoints of others as sources, the selection of their entries, and their origin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.convert.convert import convert
from shardckpt.convert.single_files import read_one
from shardckpt.convert.sources import (
    Foreign,
    LazyTensor,
    Origin,
    Selected,
    foreign,
    origin_of,
    state_in_memory,
)
from shardckpt.convert.transformed import Cast
from tests.convert.layouts import loaded


def test_what_ranks_had_of_their_own(tmp_path):
    own = shardckpt.PerRank({"seed": 5, "state": torch.arange(3), "array": np.arange(2)})
    shardckpt.save({"w": torch.ones(2), "rng": own, "other": own}, tmp_path / "c")
    convert(str(tmp_path / "c"), str(tmp_path / "d"), keys=["rng", "w"], rename={"w": "v"})
    with shardckpt.open_checkpoint(tmp_path / "d") as checkpoint:
        assert set(checkpoint) == {"v", "rng"}
        assert set(checkpoint.manifest.tensors) == {"v", "rng.state@rank0", "rng.array@rank0"}
    back = {"v": torch.zeros(2), "rng": shardckpt.PerRank({"seed": 0, "state": 0, "array": 0})}
    shardckpt.load(back, tmp_path / "d")
    assert back["rng"].value["state"].tolist() == [0, 1, 2]
    convert(str(tmp_path / "c"), str(tmp_path / "x.safetensors"), keys="rng")
    (listed,) = read_one(str(tmp_path / "x.safetensors"))["rng"]
    assert (listed["seed"], listed["array"].tolist()) == (5, [0, 1])


def test_files_beside_shards_are_listed(tmp_path):
    shardckpt.save({"w": torch.ones(2)}, tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("{}")
    report, _ = loaded(tmp_path / "c")
    assert report.left_out.keys() == {"tokenizer.json"}
    assert report.source_format == "shardckpt"


STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": {"c": torch.ones(2), "n": 5}, "t": None}


def test_a_state_in_memory_is_a_source():
    closed = []
    tensors = {"w": LazyTensor(torch.int16, (4,), lambda offsets, sizes: torch.tensor([7, 8]))}
    with Foreign(
        "path", "a test", {"w": {"$tensor": "w"}}, tensors, close=lambda: closed.append(1)
    ):
        pass
    assert closed == [1]
    source = foreign("path", "a test", STATE)
    assert source.path == "path"
    assert source.manifest.notes == {"converted": "from a test"}
    entry = source.manifest.tensors["a"]
    assert (entry.dtype, entry.shape, len(entry.chunks)) == ("F32", (2, 3), 0)
    assert source.read_box("a", (0, 1), (2, 1)).tolist() == [[1.0], [4.0]]
    assert source.read_box("a", (0, 1), (2, 1)).is_contiguous()


def test_sources_have_one_id_if_their_entries_and_identity_agree():
    ids = {
        foreign("p", "f", state, identity=identity).manifest.checkpoint_id
        for state in (STATE, {**STATE, "t": 1}, {**STATE, "a": torch.ones(2, 2)})
        for identity in (1, 2)
        for _ in range(2)
    }
    assert len(ids) == 6


def test_a_tensor_is_read_by_its_own_function_when_it_is_given():
    asked = []
    tensor = torch.empty(4)

    def read(offsets, sizes):
        asked.append((offsets, sizes))
        return torch.full(sizes, 9.0)

    source = foreign("p", "f", {"w": tensor, "v": torch.ones(1)}, reads={id(tensor): read})
    assert source.read_box("w", (1,), (2,)).tolist() == [9, 9]
    assert source.read_box("v", (0,), (1,)).tolist() == [1]
    assert asked == [((1,), (2,))]


def test_values_of_ranks_are_kept_by_rank():
    ranks = [{"rng": rank, "t": torch.full((2,), float(rank))} for rank in range(3)]
    state = {"w": torch.ones(1), **{n: shardckpt.PerRank(v) for n, v in ranks[0].items()}}
    source = foreign("p", "f", state, per_rank=ranks)
    assert source.manifest.world_size == 3
    plain = state_in_memory(source, source.manifest.state)
    assert plain["rng"] == [0, 1, 2]
    assert [t.tolist() for t in plain["t"]] == [[0, 0], [1, 1], [2, 2]]


def test_an_error_about_an_entry_has_the_path_of_the_source():
    with pytest.raises(errors.StateError) as raised:
        foreign("some/path", "f", {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})
    assert (raised.value.path, raised.value.tensor) == ("some/path", "a.b")
    with pytest.raises(errors.CorruptionError):
        Foreign("some/path", "f", {"$tensor": "absent"}, {})


def test_a_selection_renames_reads_and_closes_its_source():
    source = foreign("p", "f", STATE)
    closed = []
    source.close = lambda: closed.append(1)
    with Selected(source, keys=["x", "t"], rename={"b": "x"}) as selected:
        assert set(selected.manifest.tensors) == {"x.c"}
        assert selected.read_box("x.c", (0,), (2,)).tolist() == [1, 1]
        assert state_in_memory(selected, selected.manifest.state)["x"]["n"] == 5
        assert selected.path == "p"
    assert closed == [1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keys": ["absent"]}, errors.LoadMismatchError, "keys= names 'absent'"),
        ({"rename": {"absent": "x"}}, errors.LoadMismatchError, "rename= names 'absent'"),
        ({"keys": []}, errors.LoadMismatchError, "No entry"),
        ({"rename": {"a": "t"}}, errors.StateError, "t"),
    ],
)
def test_a_selection_of_nothing_or_of_one_name_twice_is_refused(options, error, message):
    with pytest.raises(error, match=message) as raised:
        Selected(foreign("p", "f", STATE), **options)
    assert type(raised.value) is error


def test_the_origin_is_found_through_selections_and_casts():
    origin = Origin(format="a test", writer="w", left_out={"x": "why"})
    source = foreign("p", "f", STATE, origin=origin)
    assert origin_of(Cast(Selected(source, keys=["a"]), torch.float16)) is origin
    assert origin_of(foreign("p", "f", STATE)) == Origin(format="f")


def test_tied_tensors_are_read_once_and_stay_one(monkeypatch):
    weight = torch.ones(3)
    source = foreign("p", "f", {"a": weight, "b": weight})
    asked, read = [], source.read_box
    source.read_box = lambda *box: asked.append(box) or read(*box)
    state = state_in_memory(source, source.manifest.state)
    assert state["a"] is state["b"]
    assert len(asked) == 1
