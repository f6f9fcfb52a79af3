"""Files of llama.cpp as sources. One was written by its own package: see made_by/write_gguf.py."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main
from shardckpt.convert.opening import open_source

WRITTEN = Path(__file__).parent / "made_by" / "model.gguf"
VALUES = torch.arange(64.0).reshape(2, 32) / 7
EXPECTED = {
    "blk.0.attn_q.weight": VALUES,
    "blk.0.ffn_up.weight": VALUES.reshape(2, 4, 8).half(),
    "bias": torch.arange(3.0, dtype=torch.float64),
    "positions": torch.arange(5, dtype=torch.int32) - 2,
    "token_embd.weight": VALUES.bfloat16(),
}


def test_the_tensors_of_the_real_package_are_read(tmp_path):
    report = shardckpt.convert(WRITTEN, tmp_path / "c")
    found = shardckpt.load_state(tmp_path / "c")
    assert found.keys() == EXPECTED.keys()
    for name, tensor in EXPECTED.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert report.left_out["output.weight"] == "is quantized: Q8_0"
    assert "tokenizer.ggml.tokens" in report.left_out["metadata"]
    assert report.source_format == "a file of llama.cpp"


def test_a_box_is_read_alone():
    with open_source(WRITTEN) as source:
        box = source.read_box("blk.0.ffn_up.weight", (1, 1, 2), (1, 2, 3))
        assert torch.equal(box, EXPECTED["blk.0.ffn_up.weight"][1:2, 1:3, 2:5])


def test_the_commands_name_its_tensors(capsys, tmp_path):
    assert main(["inspect", str(WRITTEN)]) == 0
    text = capsys.readouterr().out
    assert "blk.0.attn_q.weight" in text
    assert "left out: output.weight: is quantized: Q8_0" in text
    (tmp_path / "model.gguf").write_bytes(WRITTEN.read_bytes())
    assert main(["inspect", str(tmp_path)]) != 0
    assert "convert the .gguf file itself" in capsys.readouterr().err


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word.encode())) + word.encode()


def described(*values: bytes, tensors: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, count, len(values))
    return head + b"".join(values) + tensors


def test_the_other_files_of_a_divided_model_are_named(tmp_path):
    count = text("split.count") + struct.pack("<IH", 2, 3)
    (tmp_path / "x-00001-of-00003.gguf").write_bytes(described(count))
    report = shardckpt.convert(tmp_path / "x-00001-of-00003.gguf", tmp_path / "c")
    assert "of 3 files" in report.left_out["the other files"]


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


ARRAY = text("a") + struct.pack("<I", 9)


@pytest.mark.parametrize(
    "content",
    [
        described()[:12],
        described(count=1 << 60),
        described(text("a") + struct.pack("<I", 99)),
        described(struct.pack("<Q", 1 << 62)),
        described(ARRAY + struct.pack("<IQ", 9, 1)),
        described(ARRAY + struct.pack("<IQ", 8, 1 << 40)),
        described(ARRAY + struct.pack("<IQ", 10, 1 << 61)),
        described(text("general.alignment") + struct.pack("<II", 4, 0)),
        described(text("general.alignment") + struct.pack("<Id", 12, float("nan"))),
        described(tensors=tensor("w", (4,)), count=1),
        described(tensors=tensor("w", (1 << 40, 1 << 40)), count=1),
        described(tensors=tensor("w", (1,) * 5), count=1),
        described(tensors=tensor("w", (1,), offset=(1 << 64) - 32), count=1),
        described(tensors=tensor("w", (0,)) * 2, count=2),
        described(tensors=struct.pack("<Q", 2) + b"\xff\xff" + bytes(16), count=1),
    ],
    ids=range(15),
)
def test_an_invalid_file_is_a_typed_error(content, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(errors.CorruptionError, match=r"x\.gguf"):
        open_source(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("content", "actual"),
    [
        (b"PK\3\4", "begins"),
        (described(version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ],
)
def test_another_version_is_named(content, actual, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(errors.NotACheckpointError, match=actual):
        open_source(tmp_path / "x.gguf")


def test_changed_bytes_end_in_tensors_or_a_typed_error(tmp_path):
    good, path = WRITTEN.read_bytes(), tmp_path / "x.gguf"
    rng = random.Random(0)
    failed = 0
    for _ in range(300):
        data = bytearray(good[: rng.choice([len(good), rng.randrange(len(good))])])
        for _ in range(rng.randrange(3)):
            data[rng.randrange(min(len(data), 900))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with open_source(path) as source:
                for name, entry in source.manifest.tensors.items():
                    source.read_box(name, (0,) * len(entry.shape), entry.shape)
        except errors.CheckpointError:
            failed += 1
    assert 50 < failed < 300
