"""A target appears complete or not at all, and replaces only a conversion."""

from __future__ import annotations

import os

import pytest

from shardckpt import errors
from shardckpt.convert.convert import convert
from shardckpt.convert.opening import open_source
from shardckpt.convert.sources import Selected

pytestmark = pytest.mark.filterwarnings("ignore")  # DCP's, of one process


def test_only_a_conversion_is_replaced(tmp_path, saved):
    target = str(tmp_path / "hf")
    convert(saved, target, to="hf", keys="model")
    with pytest.raises(errors.CheckpointExistsError):
        convert(saved, target, to="hf", keys="model")
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(errors.NotACheckpointError, match=r"config\.json"):
        convert(saved, target, to="hf", keys="model", overwrite=True)
    (tmp_path / "hf" / "config.json").unlink()
    convert(saved, target, to="hf", keys="model.scalar", overwrite=True)
    assert set(open_source(target).manifest.tensors) == {"model.scalar"}
    with pytest.raises(errors.NotACheckpointError):
        convert(saved, target, to="dcp", overwrite=True)
    assert os.listdir(tmp_path) == ["hf"]


def test_a_rank_fails_and_nothing_is_left(tmp_path, saved, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    for to in ("hf", "dcp", "shardckpt"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
            patch.setattr(Selected, "read_box", fail)
            convert(saved, str(tmp_path / "t"), to=to, keys="model")
        assert os.listdir(tmp_path) == []
