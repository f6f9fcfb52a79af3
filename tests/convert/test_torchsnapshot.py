"""Folders of torchsnapshot, written by torchsnapshot itself: see made_by/write_torchsnapshot.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.convert.opening import open_source
from shardckpt.convert.torchsnapshot import open_torchsnapshot

WRITTEN = Path(__file__).parent / "made_by" / "torchsnapshot-0.1.0"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(WRITTEN, tmp_path / "snapshot"))


def edit(folder: Path, change) -> None:
    """Change the metadata of a folder."""
    path = folder / ".snapshot_metadata"
    document = json.loads(path.read_text())
    change(document["manifest"])
    path.write_text(json.dumps(document))


def test_every_entry_is_converted_or_listed(folder, tmp_path):
    report = shardckpt.convert(folder, tmp_path / "c")
    found = shardckpt.load_state(tmp_path / "c")
    model = found["model"]
    assert torch.equal(model["sharded"], torch.arange(24.0).reshape(6, 4))
    assert torch.equal(model["weight"], torch.arange(12.0).reshape(3, 4))
    assert torch.equal(model["half"], torch.arange(3.0).half())
    assert torch.equal(model["chunked"], torch.arange(40.0).reshape(10, 4))
    assert torch.equal(model["scalar"], torch.tensor(2.5))
    assert torch.equal(model["complex"], torch.tensor([1 + 2j]))
    assert torch.equal(found["extra"]["t"], torch.ones(2))
    assert found["progress"] == {
        "step": 7,
        "loss": 0.25,
        "done": False,
        "name": "a/b%é",
        "raw": b"\0\1",
        "history": [1, {"x": 2.0}],
        "order": {"z": 1, 3: 2},
        "pair": (1, 2),
        "rank": 0,
    }
    assert list(found["progress"]["order"]) == ["z", 3]
    assert report.writer == "torchsnapshot 0.1.0"
    assert report.left_out["progress.settings"] == "holds an object of __main__.Settings"
    assert report.left_out["progress.rank of rank 1"] == "the entry of rank 0 is taken"


def test_a_part_is_read_alone(folder):
    with open_source(folder) as source:
        part = source.read_box("model.sharded", (2, 1), (3, 2))
    assert part.tolist() == [[9, 10], [13, 14], [17, 18]]


def test_the_parts_of_a_tensor_are_read_once_for_all_its_boxes(folder, monkeypatch):
    read = []
    names = open_torchsnapshot.__globals__
    mapped = names["mapped"]
    monkeypatch.setitem(names, "mapped", lambda path: read.append(path) or mapped(path))
    with open_source(folder) as source:
        read.clear()
        rows = [source.read_box("model.chunked", (row, 0), (1, 4)) for row in range(10)]
    assert torch.equal(torch.cat(rows), torch.arange(40.0).reshape(10, 4))
    assert len(read) < 10


def test_a_missing_part_of_a_tensor_is_found(folder, tmp_path):
    edit(folder, lambda manifest: manifest["0/model/sharded"]["shards"].clear())
    with pytest.raises(errors.CoverageError, match=r"model\.sharded"):
        shardckpt.convert(folder, tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["0/progress/loss"].update(serialized_value="AA"),
        lambda m: m["0/progress/done"].update(serialized_value="maybe"),
        lambda m: m["0/progress/step"].update(type="code"),
        lambda m: m["0/model/half"].update(shape=[4]),
        lambda m: m["0/model/half"].update(shape=[1 << 50]),
        lambda m: m["0/model/half"].update(byte_range=[96, 1 << 40]),
        lambda m: m["0/model/half"].update(serializer="pickle"),
        lambda m: m["0/model/half"].update(location="../../x"),
        lambda m: m["0/model/half"].update(location="/etc/passwd"),
        lambda m: m["0/model/half"].pop("dtype"),
        lambda m: m.update({"x/model": {"type": "dict", "keys": []}}),
        lambda m: m["0/progress"].pop("type"),
    ],
)
def test_damage_is_a_typed_error(folder, tmp_path, change):
    edit(folder, change)
    with pytest.raises(errors.CheckpointError):
        shardckpt.convert(folder, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_missing_files_and_metadata_in_yaml(folder, tmp_path):
    shutil.rmtree(folder / "batched")
    with pytest.raises(errors.CheckpointError):
        shardckpt.convert(folder, tmp_path / "c")
    (folder / ".snapshot_metadata").write_text("version: 0.0.1\n")
    with pytest.raises(errors.NotACheckpointError, match="YAML"):
        shardckpt.convert(folder, tmp_path / "c")
