"""A full state as one file, or as one file for each component."""

from __future__ import annotations

import argparse
import errno
import inspect
import json
import os

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.convert.convert import convert
from shardckpt.convert.opening import open_source
from shardckpt.convert.single_files import (
    DIGEST,
    INDEX,
    TREE,
    check_loads,
    check_records,
    check_sealed,
    check_suffix,
    errors_of,
    is_one_file,
    is_sealed,
    is_single_file,
    read_many,
    read_metadata,
    read_one,
    write_many,
    write_one,
)
from shardckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptionError,
    NotACheckpointError,
    ShardckptError,
    StateError,
    StoragePermissionError,
    UnsupportedLeafError,
)
from tests.convert.states import same


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("key", [TREE, DIGEST, "__metadata__"])
def test_no_flipped_bit_makes_our_file_foreign(tmp_path, key, check):
    path = tmp_path / "x.safetensors"
    write_one({"a": torch.ones(2), "n": 1}, str(path), overwrite=False)
    data = path.read_bytes()
    begin = data.index(f'"{key}"'.encode()) + 1
    for bit in range(8 * len(key)):
        changed = bytearray(data)
        changed[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CorruptionError):
            read_one(str(path), check=check)
        if bit % 8 == 0:  # they share what tells
            with pytest.raises(CorruptionError):
                open_source(str(path), check=check)


def test_a_link_that_a_user_makes_to_a_file_is_followed(tmp_path):
    for name in ("x.pth", "x.safetensors"):
        write_one({"a": torch.ones(2)}, str(tmp_path / f"real-{name}"), overwrite=False)
        (tmp_path / name).symlink_to(f"real-{name}")
        assert same(read_one(str(tmp_path / name)), {"a": torch.ones(2)})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt", ""])
def test_file_names_that_are_not_utf8(tmp_path, suffix):
    """Every reader can read a file that was saved under such a name."""
    path = str(tmp_path) + os.sep + os.fsdecode(b"w\xff") + suffix
    write_one({"a": torch.arange(3.0), "n": 1}, str(tmp_path / "x.pth"), overwrite=False)
    convert(tmp_path / "x.pth", path)
    convert(path, tmp_path / "back.pth")
    assert same(read_one(str(tmp_path / "back.pth")), {"a": torch.arange(3.0), "n": 1})


def test_a_strict_reader_names_the_class(tmp_path):
    torch.save({"args": argparse.Namespace()}, tmp_path / "x.pth")
    for read in (NNHandler.load, read_one):
        with pytest.raises(errors.NotACheckpointError, match=r"argparse\.Namespace") as caught:
            read(str(tmp_path / "x.pth"))
        assert "\x1b" not in str(caught.value)
        assert "shardckpt convert" in caught.value.remedy


STATE = {
    "w": torch.arange(300_000.0),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "a": np.arange(3),
    "n": {"t": (1, 2.5, None), "inf": float("inf"), 3: "int key"},
}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_state_is_written_as_one_file_and_read_back(tmp_path, name):
    state = STATE if name == "x.safetensors" else {k: v for k, v in STATE.items() if k != "a"}
    path, written = str(tmp_path / name), []
    write_one(state, path, overwrite=False, progress=written.append)
    assert written[-1] >= 1_200_000
    found = read_one(path)
    if name == "x.safetensors":
        assert found["a"].tolist() == [0, 1, 2]
        assert isinstance(found.pop("a"), np.ndarray)
        assert load_file(path).keys() == {"w", "half", "a"}
    assert same(found, {k: v for k, v in state.items() if k != "a"})
    with pytest.raises(CheckpointExistsError):
        write_one({"n": 1}, path, overwrite=False)
    write_one({"n": 1}, path, overwrite=True)
    assert read_one(path) == {"n": 1}
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_components_are_files_with_an_index_of_digests(tmp_path, file_format):
    state = {"model": {"w": torch.ones(3)}, "step": 7}
    folder = tmp_path / "c"
    write_many(state, str(folder), file_format, overwrite=False)
    suffix = {"torch": ".pth", "safetensors": ".safetensors"}[file_format]
    names = {f"model{suffix}", f"step{suffix}", INDEX}
    assert set(os.listdir(folder)) == names
    assert same(read_many(str(folder)), state)
    data = (folder / f"model{suffix}").read_bytes()
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    (folder / f"model{suffix}").write_bytes(changed)
    with pytest.raises(CorruptionError) as raised:
        read_many(str(folder))
    assert raised.value.path.startswith(str(folder))
    (folder / f"model{suffix}").unlink()
    with pytest.raises(ShardckptError):
        read_many(str(folder))


def test_a_folder_of_components_is_replaced_only_if_it_has_no_other_file(tmp_path):
    folder = str(tmp_path / "c")
    write_many({"a": 1, "b": 2}, folder, "torch", overwrite=False)
    write_many({"a": 3}, folder, "torch", overwrite=True)
    assert read_many(folder) == {"a": 3}
    (tmp_path / "c" / "notes.pth").touch()
    with pytest.raises(NotACheckpointError, match=r"notes\.pth"):
        write_many({"a": 4}, folder, "torch", overwrite=True)
    assert read_many(folder) == {"a": 3}


@pytest.mark.parametrize("index", ["{}", '{"files": 3}', "no json", '{"files": {"a": {}}}'])
def test_an_index_that_is_invalid_is_an_error(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ShardckptError) as raised:
        read_many(str(tmp_path))
    assert raised.value.path == str(tmp_path)
    assert raised.value.remedy == "load another checkpoint"


@pytest.mark.parametrize("name", ["../x.pth", "/x.pth", "a/x.pth"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, name):
    write_one({"a": 1}, str(tmp_path / "x.pth"), overwrite=False)
    folder = tmp_path / "c"
    folder.mkdir()
    index = {"files": {"a": {"name": name, "xxh3_128": "0" * 32}}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CorruptionError, match="outside its directory"):
        read_many(str(folder))


def test_the_suffix_of_one_file_is_known():
    assert all(map(is_one_file, ("x.pth", "x.pt", "a/x.safetensors")))
    assert not any(map(is_one_file, ("x", "x.ckpt", "x.pth/", "safetensors")))
    for path in ("run/step-1", "run.v2/step", "step-1.5", "x.pt"):
        check_suffix(path)
    with pytest.raises(StateError, match="Unknown suffix") as raised:
        check_suffix("x.ckpt", remedy="another one")
    assert (raised.value.actual, raised.value.remedy) == (".ckpt", "another one")


def test_a_directory_is_read_as_a_checkpoint_whatever_its_suffix(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "file").touch()
    assert is_single_file(str(tmp_path / "file"))
    assert is_single_file(str(tmp_path / "absent.pth"))
    assert not is_single_file(str(tmp_path / "folder.pth"))
    assert not is_single_file(str(tmp_path / "absent"))


def test_a_value_that_torch_would_refuse_to_load_is_named(tmp_path):
    state = {"a": {"b": [1, {"c": inspect.Parameter.KEYWORD_ONLY}]}, "w": torch.ones(1_000_000)}
    with pytest.raises(UnsupportedLeafError, match="weights_only=True") as raised:
        check_loads(state, "x.pth")
    assert (raised.value.path, raised.value.tensor) == ("x.pth", "a.b.1.c")
    check_loads({"a": (1, {"b": b"x"}), "w": torch.ones(2)}, "x.pth")
    with pytest.raises(UnsupportedLeafError, match="refuses") as raised:
        write_one({"f": lambda: 1}, str(tmp_path / "x.pth"), overwrite=False)
    assert os.listdir(tmp_path) == []


def test_a_part_of_an_array_is_not_written_as_one_file(tmp_path):
    part = shardckpt.ShardedArray(np.ones(2), (4,), (0,))
    with pytest.raises(StateError, match="can't hold a part") as raised:
        write_one({"x": {"w": part}}, str(tmp_path / "x.safetensors"), overwrite=False)
    assert raised.value.tensor == "x.w"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("at", [-1, 200_000, 12])
def test_every_byte_of_a_safetensors_file_is_covered_by_its_digest(tmp_path, at):
    path = tmp_path / "x.safetensors"
    write_one({"w": torch.arange(300_000.0)}, str(path), overwrite=False)
    check_sealed(str(path))
    assert is_sealed(str(path), read_metadata(str(path)))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError):
        read_one(str(path))
    data[at] ^= 1
    path.write_bytes(data[:-4])
    with pytest.raises(CorruptionError):
        read_one(str(path))


def test_a_safetensors_file_of_another_program_needs_no_digest(tmp_path):
    path = str(tmp_path / "x.safetensors")
    save_file({"w": torch.ones(2)}, path, {"format": "pt"})
    assert read_metadata(path) == {"format": "pt"}
    assert not is_sealed(path, read_metadata(path))
    assert same(read_one(path), {"w": torch.ones(2)})
    with pytest.raises(CorruptionError, match="corrupted") as raised:
        is_sealed(path, {TREE: "{}"})
    assert raised.value.actual == TREE
    with pytest.raises(CorruptionError) as raised:
        check_sealed(path)
    assert raised.value.actual == "none"


def test_a_record_of_a_torch_file_that_changed_is_named(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.full((1000,), 3.0)}, path)
    check_records(str(path))
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((9,), 3.0).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError) as raised:
        check_records(str(path))
    assert raised.value.actual.endswith("data/0")
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    check_records(str(path))


def test_errors_of_libraries_get_the_path_and_the_remedy(tmp_path):
    def failing(error, path):
        with errors_of(str(path), "try again"):
            raise error

    for error, expected in (
        (FileNotFoundError("gone"), CheckpointNotFoundError),
        (IsADirectoryError("folder"), NotACheckpointError),
        (PermissionError(errno.EACCES, "no"), StoragePermissionError),
        (SafetensorError("bad header"), CorruptionError),
        (ValueError("bad"), CorruptionError),
    ):
        with pytest.raises(expected) as raised:
            failing(error, tmp_path / "x")
        assert raised.value.path == str(tmp_path / "x")
    assert raised.value.remedy == "try again"
    with pytest.raises(NotACheckpointError, match="is missing"):
        failing(FileNotFoundError("gone"), tmp_path)
    own = StateError("typed")
    with pytest.raises(StateError) as raised:
        failing(own, tmp_path)
    assert raised.value is own
