"""Folders of DCP that convert writes are read by torch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from shardckpt.convert.convert import convert
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
