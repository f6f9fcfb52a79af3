"""Files of other programs: only regular files of the folder are opened, and small ones read."""

from __future__ import annotations

import json

import pytest

from shardckpt import errors
from shardckpt.convert.convert import convert
from tests.convert import layouts
from tests.nn_handler.models import Net


def test_links_into_the_cache_of_the_hub_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    layouts.bin_folder(tmp_path / "made", Net(width=5), files=1)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / "made" / name).rename(blobs / f"0{name}")
        (snapshot / name).symlink_to(f"../../blobs/0{name}")
    report = convert(str(snapshot), str(tmp_path / "hf"), to="hf")
    assert report.copied == ("config.json",)
    assert len(report.tensors) == len(Net(width=5).state_dict())


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_the_index_names_is_missing(tmp_path, kind):
    (tmp_path / "c").mkdir()
    index = {"metadata": {}, "weight_map": {"w": "part-1"}}
    (tmp_path / "c" / f"{kind}.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.CorruptionError, match="is missing") as caught:
        convert(str(tmp_path / "c"), str(tmp_path / "d"))
    assert caught.value.path.endswith("part-1")
    assert f"{kind}.index.json" in str(caught.value)
