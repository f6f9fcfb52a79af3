"""The metadata of DCP is read without running code."""

from __future__ import annotations

import os
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardckpt import errors
from shardckpt.convert.dcp import DcpCheckpoint
from shardckpt.convert.dcp_metadata import parse_metadata


def write(state: dict, path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path)


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK"],)


def test_metadata_runs_no_code(tmp_path, monkeypatch):
    write({"w": torch.ones(2)}, tmp_path / "c")
    monkeypatch.setenv("ATTACK", str(tmp_path / "owned"))
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(errors.CorruptionError, match="metadata"):
        DcpCheckpoint(str(tmp_path / "c"))
    assert not (tmp_path / "owned").exists()


def test_the_entries_of_the_metadata_come_back(tmp_path):
    write({"a": {"w": torch.ones(2, 3)}, "n": 7}, tmp_path / "c")
    found = parse_metadata((tmp_path / "c" / ".metadata").read_bytes())
    entry = found.metadata.state_dict_metadata["a.w"]
    assert entry.size == torch.Size([2, 3])
    assert entry.properties.dtype == torch.float32
    assert (found.writer, found.unknown) == (None, {})
    assert set(found.metadata.state_dict_metadata) == {"a.w", "n"}


@pytest.mark.parametrize("value", [{"state_dict_metadata": {}}, [1], "text"])
def test_a_pickle_of_another_value_is_refused(value):
    with pytest.raises(TypeError, match="in place of Metadata"):
        parse_metadata(pickle.dumps(value, protocol=2))


def test_bytes_after_the_pickle_are_refused():
    with pytest.raises(pickle.UnpicklingError, match="after the end"):
        parse_metadata(pickle.dumps([1], protocol=2) + b"x")
