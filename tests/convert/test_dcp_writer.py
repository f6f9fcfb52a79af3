"""Folders of DCP that convert writes are read by torch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import shardckpt
from shardckpt import errors
from shardckpt.convert import dcp_writer
from shardckpt.convert.convert import convert
from shardckpt.convert.dcp_writer import DcpFolder
from shardckpt.convert.sources import foreign
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.maintenance.reshard import rewrite
from tests.convert.states import plain, whole_state

pytestmark = pytest.mark.filterwarnings("ignore")  # DCP's, of one process


def test_torch_reads_the_dcp_directory(tmp_path, saved):
    convert(saved, str(tmp_path / "dcp"), to="dcp", shards=3)
    names = set(os.listdir(tmp_path / "dcp"))
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"}
    state = whole_state()
    state["model"] = {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}
    state["step"] = 0
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert plain(state) == plain(whole_state())
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "x.pt")
    assert plain(torch.load(tmp_path / "x.pt", weights_only=True)) == plain(whole_state())


def test_files_are_of_even_size_and_tied_tensors_have_both_names(tmp_path):
    weight = torch.arange(1_200_000.0).reshape(-1, 10)
    source = foreign("p", "f", {"a": weight, "b": weight, "c": torch.ones(7), "n": {"x": [1, 2]}})
    folder = DcpFolder(source, str(tmp_path / "d"), files=4, overwrite=False)
    assert folder.tied == {"a": ["a", "b"], "c": ["c"]}
    assert set(folder.values) == {"n.x"}
    rewrite(folder, SingleCoordinator(), lambda done_bytes: None)
    sizes = [path.stat().st_size for path in (tmp_path / "d").glob("*.distcp")]
    assert len(sizes) == 4
    assert max(sizes) < 2 * min(sizes)
    state = {"a": torch.zeros(120_000, 10), "b": torch.zeros(120_000, 10), "n": {"x": [0, 0]}}
    dcp.load(state, checkpoint_id=tmp_path / "d")
    assert torch.equal(state["a"], weight)
    assert torch.equal(state["b"], weight)
    assert state["n"] == {"x": [1, 2]}


def test_the_tensors_of_at_most_one_file_are_read_at_a_time(tmp_path):
    source = foreign("p", "f", {"w": torch.arange(400_000.0)})
    asked, read = [], source.read_box
    source.read_box = lambda *box: asked.append(box[2][0] * 4) or read(*box)
    progress = []
    folder = DcpFolder(source, str(tmp_path / "d"), files=4, overwrite=False)
    rewrite(folder, SingleCoordinator(), progress.append)
    assert sum(asked) == 1_600_000
    assert max(asked) <= 400_000 + 4096
    assert progress == sorted(progress)
    assert progress[-1] >= 400_000


def test_a_value_that_can_not_be_pickled_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    source = foreign("p", "f", {"w": torch.ones(2), "n": 5})
    monkeypatch.setattr(dcp_writer, "state_in_memory", lambda source, node: lambda: 1)
    folder = DcpFolder(source, str(tmp_path / "d"), files=1, overwrite=False)
    with pytest.raises(errors.UnsupportedLeafError, match="refuses"):
        rewrite(folder, SingleCoordinator(), lambda done_bytes: None)
    assert os.listdir(tmp_path) == []


def test_files_of_others_are_not_those_of_dcp():
    folder = DcpFolder(foreign("p", "f", {"w": torch.ones(2)}), "d", files=1, overwrite=True)
    names = [".metadata", "__0_0.distcp", "__12_3.distcp", "config.json", "__0_0.distcp~"]
    assert folder.foreign(names) == ["config.json", "__0_0.distcp~"]


def test_an_empty_state_has_no_entries(tmp_path):
    shardckpt.save({}, tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "dcp", to="dcp")
    assert dcp.FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata == {}
    convert(tmp_path / "dcp", tmp_path / "again")
    assert shardckpt.load_state(tmp_path / "again") == {}
