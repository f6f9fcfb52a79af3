"""Files of other programs: only regular files of the folder are opened, and small ones read."""

from __future__ import annotations

import json
import os

import pytest

from shardckpt import errors
from shardckpt.convert import foreign_file
from shardckpt.convert.convert import convert
from shardckpt.convert.foreign_file import (
    check_regular,
    file_in,
    indexed_file,
    mapped,
    open_regular,
    read_small,
    utf8_path,
)
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


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    found = {"folder": "a directory", "pipe": "a pipe"}
    for name, actual in {**found, "/dev/null": "a device"}.items():
        path = os.path.join(tmp_path, name)
        for call in (check_regular, open_regular, read_small):
            with pytest.raises(errors.NotACheckpointError, match="not a regular file") as raised:
                call(path)
            assert (raised.value.path, raised.value.actual) == (path, actual)
    with pytest.raises(FileNotFoundError):
        open_regular(str(tmp_path / "nothing"))


def test_a_file_that_becomes_a_pipe_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("x")

    def replace(checked):
        path.unlink()
        os.mkfifo(path)

    real = foreign_file.check_regular
    answers = [replace, real]
    monkeypatch.setattr(foreign_file, "check_regular", lambda path: answers.pop(0)(path))
    with pytest.raises(errors.NotACheckpointError) as raised:
        open_regular(str(path))
    assert raised.value.actual == "a pipe"


def test_a_file_is_read_completely_up_to_its_limit(tmp_path):
    path = tmp_path / "index.json"
    path.write_bytes(b"12345")
    assert read_small(str(path), limit_bytes=5) == b"12345"
    with pytest.raises(errors.CorruptionError, match="too large") as raised:
        read_small(str(path), limit_bytes=4)
    assert (raised.value.expected, raised.value.actual) == ("at most 4 bytes", "5 bytes")


def test_a_map_of_an_empty_file_is_empty_and_of_others_is_closed(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_bytes(b"abc")
    with mapped(str(tmp_path / "empty")) as found:
        assert found == b""
    with mapped(str(tmp_path / "full")) as found:
        assert found[:] == b"abc"
    assert found.closed
    with pytest.raises(ZeroDivisionError), mapped(str(tmp_path / "full")) as found:
        held = memoryview(found)
        raise ZeroDivisionError  # not the BufferError of a map that is still in use
    held.release()


def test_a_path_that_is_not_utf8_gets_one_that_is(tmp_path):
    path = os.path.join(tmp_path, os.fsdecode(b"w\xff"))
    with open(path, "w") as file:
        file.write("x")
    with utf8_path(path) as other:
        assert other.encode()
        assert os.path.samefile(other, path)
    with utf8_path(str(tmp_path)) as same:
        assert same == str(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\0", 3, None, ["a"]])
def test_an_index_names_only_files_of_its_folder(tmp_path, name):
    with pytest.raises(errors.CorruptionError, match="outside its directory") as raised:
        file_in(str(tmp_path), name)
    assert (raised.value.path, raised.value.actual) == (str(tmp_path), repr(name))


def test_links_lead_to_files_of_the_folder_or_to_blobs_of_the_hub(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    for folder in (snapshot, tmp_path / "models--x" / "blobs", tmp_path / "blobs"):
        folder.mkdir(parents=True)
    for path in (
        snapshot / "own",
        tmp_path / "models--x" / "blobs" / "1",
        tmp_path / "blobs" / "1",
    ):
        path.touch()
    for name, target in {"same": "own", "blob": "../../blobs/1", "none": "nothing"}.items():
        (snapshot / name).symlink_to(target)
        assert file_in(str(snapshot), name) == str(snapshot / name)
    (snapshot / "out").symlink_to("../../../blobs/1")
    with pytest.raises(errors.CorruptionError, match="leads out of its folder") as raised:
        file_in(str(snapshot), "out")
    assert raised.value.path == str(snapshot / "out")
    assert raised.value.actual == f"a link to {tmp_path}/blobs/1"


def test_a_missing_file_of_an_index_is_named_with_the_index(tmp_path):
    (tmp_path / "part-1").touch()
    assert indexed_file(str(tmp_path), "part-1", "index.json") == str(tmp_path / "part-1")
    with pytest.raises(errors.CorruptionError, match="is missing") as raised:
        indexed_file(str(tmp_path), "part-2", "index.json")
    assert raised.value.expected == "a file, which index.json names"
