"""The names of dtypes, and the form of their elements in a shard."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import shardckpt
from shardckpt.convert.convert import convert
from shardckpt.errors import CheckpointError, UnsupportedLeafError
from shardckpt.format import dtypes
from shardckpt.format.dtype_names import itemsize, plain_form, shard_form
from shardckpt.format.dtypes import DTYPES, OPAQUE, dtype_name, memory_dtype, memory_view
from shardckpt.format.safetensors_header import parse_header

ITEMSIZES = {"BOOL": 1, "U8": 1, "I16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 8, "C128": 16}


def test_every_dtype_has_one_name_and_its_size():
    for name, dtype in DTYPES.items():
        assert dtype_name(dtype, tensor="w") == name
        assert itemsize(name) == dtype.itemsize
    assert {name: itemsize(name) for name in ITEMSIZES} == ITEMSIZES
    assert len(set(DTYPES.values())) == len(DTYPES)


def test_a_dtype_that_can_not_be_saved_is_refused_with_the_name_of_the_tensor():
    with pytest.raises(UnsupportedLeafError) as caught:
        dtype_name(torch.qint8, tensor="layer.w")
    assert (caught.value.tensor, caught.value.actual) == ("layer.w", "qint8")
    assert "dequantize" in caught.value.remedy


def test_a_chunk_in_a_shard_has_a_dtype_of_safetensors_and_as_many_bytes():
    plain = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64"}
    plain |= {"BF16", "C64", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"}
    for name in DTYPES:
        form, shape = shard_form(name, (3, 2))
        assert form in plain
        elements = torch.Size(shape).numel()
        assert elements * itemsize(form) == 6 * itemsize(name)
        assert (form == name) == (name in plain)
    assert shard_form("C128", (3,)) == ("F64", (3, 2))
    assert shard_form("BITS16", ()) == ("U16", ())


def test_only_dtypes_of_safetensors_go_into_its_files():
    assert plain_form("BF16", (2,), tensor="w") == ("BF16", (2,))
    for name in {"C32", "C128", "UINT4", "BITS8"} & DTYPES.keys():
        with pytest.raises(UnsupportedLeafError, match="safetensors") as caught:
            plain_form(name, (2,), tensor="w")
        assert caught.value.tensor == "w"
    assert plain_form("F4X2", (3, 4), tensor="w") == ("F4", (3, 8))
    with pytest.raises(UnsupportedLeafError, match="safetensors"):
        plain_form("F4X2", (), tensor="w")


def test_integers_of_a_few_bits_are_copied_as_bytes():
    codes = torch.arange(4, dtype=torch.uint8)
    for name in ("UINT1", "UINT7", "INT4"):
        view = memory_view(codes.view(DTYPES[name]))
        assert view.dtype == memory_dtype(name) == torch.uint8
        assert view.tolist() == codes.tolist()
        assert view.data_ptr() == codes.data_ptr()
        assert DTYPES[name] in OPAQUE
    floats = torch.ones(2)
    assert memory_view(floats) is floats
    assert memory_dtype("F32") == torch.float32


@pytest.fixture
def without_bfloat16(monkeypatch):
    """A torch that lacks bfloat16, as early versions lack other dtypes. Enter it to begin."""

    def begin():
        monkeypatch.delitem(dtypes.DTYPES, "BF16")
        monkeypatch.delattr(torch, "bfloat16")

    return begin


def test_a_dtype_that_this_torch_lacks_is_named(tmp_path, without_bfloat16):
    shardckpt.save({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "tensor")
    shardckpt.save({"dtype": torch.bfloat16}, tmp_path / "value")
    save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "file.safetensors")
    without_bfloat16()
    for name, tensor in (("tensor", "w"), ("value", None)):
        with pytest.raises(CheckpointError) as caught:
            shardckpt.load_state(tmp_path / name)
        assert type(caught.value) is CheckpointError
        assert caught.value.tensor == tensor
        assert caught.value.expected == "a torch with bfloat16"
        assert caught.value.actual == f"torch {torch.__version__}"
        assert "install a later torch" in caught.value.remedy
    with pytest.raises(CheckpointError, match="a torch with bfloat16"):
        convert(tmp_path / "file.safetensors", tmp_path / "converted")
    (shard,) = (tmp_path / "tensor").glob("*.safetensors")
    with pytest.raises(CheckpointError, match="a torch with bfloat16"):
        parse_header(shard.read_bytes(), file_size_bytes=None, path=str(shard))


def test_a_dtype_without_a_meaning_is_not_found():
    assert dtypes.torch_dtype("int8") is torch.int8
    with pytest.raises(KeyError):
        dtypes.torch_dtype("nn")
