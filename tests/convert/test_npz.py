"""Files of numpy as sources."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main
from shardckpt.convert.opening import open_source

ARRAYS = {
    "w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">i4"),
    "scalar": np.float64(2.5),
    "empty": np.ones((0, 4), dtype=np.int8),
    "layer/bias": np.array([True, False]),
    "complex": np.array([1 + 2j]),
}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_every_array_is_read(write, tmp_path):
    write(tmp_path / "x.npz", **ARRAYS)
    report = shardckpt.convert(tmp_path / "x.npz", tmp_path / "c")
    found = shardckpt.load_state(tmp_path / "c")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].numpy().dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(found[name].numpy(), array)
    assert report.source_format == "a file of numpy"
    with open_source(tmp_path / "x.npz") as source:
        assert source.read_box("w", (1, 0, 2), (1, 3, 2)).tolist() == [
            [[14, 15], [18, 19], [22, 23]]
        ]


def test_an_archive_is_opened_once_and_an_array_is_read_once_for_all_its_boxes(
    tmp_path, monkeypatch
):
    np.savez_compressed(tmp_path / "x.npz", **{f"w{i}": np.arange(8.0) for i in range(3)})
    opened, read = [], []
    for method, calls in ((zipfile.ZipFile.__init__, opened), (zipfile.ZipFile.read, read)):

        def counted(self, *args, method=method, calls=calls):
            calls.append(args[0])
            return method(self, *args)

        monkeypatch.setattr(zipfile.ZipFile, method.__name__, counted)
    with open_source(tmp_path / "x.npz") as source:
        for name in source.manifest.tensors:
            parts = [source.read_box(name, (at,), (1,)) for at in range(8)]
            assert torch.equal(torch.cat(parts), torch.arange(8.0, dtype=torch.float64))
    assert (len(opened), read) == (1, ["w0.npy", "w1.npy", "w2.npy"])


def test_objects_and_texts_are_left_out(tmp_path):
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "x.npz", w=np.ones(2), objects=objects, text=np.array(["a"]))
    report = shardckpt.convert(tmp_path / "x.npz", tmp_path / "c")
    assert report.tensors == ("w",)
    assert report.left_out.keys() == {"objects", "text"}


def test_an_archive_without_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("data.pkl", b"")
    with pytest.raises(errors.CorruptionError, match="without arrays"):
        shardckpt.convert(tmp_path / "x.npz", tmp_path / "c")


class Harm:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_no_pickle_is_loaded(tmp_path):
    array = np.array([Harm(tmp_path / "mark")], dtype=object)
    np.savez(tmp_path / "x.npz", w=np.ones(1), harm=array)
    shardckpt.convert(tmp_path / "x.npz", tmp_path / "c")
    assert main(["verify", str(tmp_path / "x.npz")]) == 0
    assert not (tmp_path / "mark").exists()


def member(descr: str, shape: str, data: bytes) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        member("'<f4'", "(1000000000000,)", b"\0" * 8),
        member("'<f4'", "(3,)", b"\0" * 8),
        member("'<f4'", "(-2,)", b"\0" * 8),
        member("'<f4'", "__import__('os').system('x')", b"\0" * 8),
        member("'<f4'", "(2,", b"\0" * 8),
        member("'nothing'", "(2,)", b"\0" * 8),
        b"no numpy",
        b"",
    ],
)
def test_damage_is_a_typed_error(content, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("w.npy", content)
    with pytest.raises(errors.CorruptionError):
        shardckpt.convert(tmp_path / "x.npz", tmp_path / "c")


def test_truncated_files_flipped_bits_and_bombs(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, w=np.arange(1000.0))
    data = bytearray(path.read_bytes())
    data[4000] ^= 1
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", member("'<f4'", "(25000000,)", b"\0" * 100_000_000))
    for content in (data[:-100], bytes(data), b"PK", b"", bomb.getvalue()):
        path.write_bytes(content)
        with pytest.raises(errors.CorruptionError):
            shardckpt.convert(path, tmp_path / "c")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("w.npy", member("'<f4'", "(2,)", b"\0" * 8))
    with pytest.raises(errors.CorruptionError, match="two arrays"):
        shardckpt.convert(path, tmp_path / "c")
