"""safetensors files and folders in the layout of Hugging Face are written and read."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main
from shardckpt.convert.convert import convert
from shardckpt.convert.safetensors_files import HuggingFace, open_hugging_face, open_safetensors
from shardckpt.convert.single_files import read_one, write_one
from shardckpt.convert.sources import foreign
from shardckpt.format.dtypes import DTYPES
from shardckpt.state.saved_tree import SavedState
from tests.convert import layouts
from tests.convert.layouts import loaded, same_weights
from tests.convert.states import model, plain
from tests.nn_handler.models import Net


def test_the_model_as_hugging_face_has_it(tmp_path, saved):
    names = ["--keys", "model", "--rename", "model=", "--max-file-size", "1MB"]
    assert main(["convert", saved, str(tmp_path / "hf"), "--format", "hf", *names]) == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    found = {name: load_file(tmp_path / "hf" / name) for name in files}
    want = model()
    tied = want.pop("tied")
    assert plain({k: v for own in found.values() for k, v in own.items()}) == plain(want)
    assert index["weight_map"] == {k: name for name, own in found.items() for k in own}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    with safe_open(tmp_path / "hf" / index["weight_map"]["layers.0.weight"], "pt") as file:
        assert file.metadata() == {"format": "pt", "tied": "layers.0.weight"}
    convert(str(tmp_path / "hf"), str(tmp_path / "back"), rename={"": "model"})
    back = {"model": {name: torch.zeros_like(tensor) for name, tensor in model().items()}}
    shardckpt.load(back, tmp_path / "back")
    assert plain(back["model"]) == plain({**want, "tied": tied})


def test_files_beside_the_weights_are_copied_to_hugging_faces_layout(tmp_path):
    model, folder = Net(width=5), tmp_path / "c"
    layouts.trainer_folder(folder, model)
    (tmp_path / "secret.json").write_text("secret")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    companions = {"config.json", "generation_config.json", "tokenizer.json"}
    for overwrite in (False, True):
        report = convert(str(folder), str(tmp_path / "hf"), to="hf", overwrite=overwrite)
        assert set(report.copied) == companions
        assert "special_tokens_map.json" in report.left_out
        assert not companions & report.left_out.keys()
        assert json.loads((tmp_path / "hf" / "config.json").read_text()) == layouts.CONFIG
        weights = {n for n in os.listdir(tmp_path / "hf") if n not in companions}
        assert all(name.startswith("model") for name in weights)
    (tmp_path / "hf" / "tokenizer.json").write_text("mine")
    with pytest.raises(errors.NotACheckpointError, match=r"tokenizer\.json"):
        convert(str(folder), str(tmp_path / "hf"), to="hf", overwrite=True)


def test_an_adapter_and_other_weights(tmp_path):
    layouts.trainer_folder(tmp_path / "c", Net(width=5))
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "adapter_model.safetensors")
    (tmp_path / "c" / "adapter_config.json").write_text("{}")
    report, state = loaded(tmp_path / "c")
    assert same_weights(state, Net(width=5)) or len(state) == len(report.tensors)
    report = convert(str(tmp_path / "c"), str(tmp_path / "hf"), to="hf")
    assert "adapter_config.json" in report.copied
    assert set(load_file(tmp_path / "hf" / "model.safetensors")) == set(state)
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()


def test_a_file_is_read_by_boxes_with_its_aliases(tmp_path):
    path = tmp_path / "x.safetensors"
    weight = torch.arange(12.0).reshape(3, 4)
    save_file({"w": weight, "s": torch.tensor(2)}, path, {"format": "pt", "tied": "w", "x": "y"})
    with open_safetensors(str(path), check=True) as source:
        assert SavedState(source.manifest).leaves.keys() == {"w", "s", "tied"}
        assert source.read_box("w", (1, 1), (2, 2)).tolist() == [[5, 6], [9, 10]]
        assert source.read_box("s", (), ()).item() == 2


def test_the_digest_of_our_file_is_verified_only_when_asked(tmp_path):
    path = tmp_path / "x.safetensors"
    write_one({"w": torch.arange(9.0)}, str(path), overwrite=False)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    open_safetensors(str(path), check=False).close()
    with pytest.raises(errors.CorruptionError) as raised:
        open_safetensors(str(path), check=True)
    assert raised.value.path == str(path)


@pytest.mark.parametrize(
    ("weight_map", "tensor"),
    [
        ({"w": "f.safetensors"}, "v"),
        ({"w": "f.safetensors", "v": "f.safetensors", "u": "f.safetensors"}, "u"),
    ],
)
def test_an_index_that_does_not_match_a_file_is_corruption(tmp_path, weight_map, tensor):
    save_file({"w": torch.ones(1), "v": torch.ones(1)}, tmp_path / "f.safetensors")
    index = "model.safetensors.index.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(errors.CorruptionError, match="does not match") as raised:
        open_hugging_face(str(tmp_path), index)
    assert (raised.value.path, raised.value.tensor) == (f"{tmp_path}/f.safetensors", tensor)
    assert raised.value.expected == f"the {len(weight_map)} tensors that {index} names"


def test_tensors_have_the_order_of_the_index(tmp_path):
    for name in "ba":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"b": "b.safetensors", "a": "a.safetensors"}}
    (tmp_path / "i.json").write_text(json.dumps(index))
    with open_hugging_face(str(tmp_path), "i.json") as source:
        assert list(source.manifest.tensors) == ["b", "a"]
        assert source.origin.files == ("a.safetensors", "b.safetensors", "i.json")


def test_files_are_filled_up_to_their_size_and_a_larger_tensor_is_alone():
    state = {name: torch.ones(size) for name, size in zip("abcd", (4, 6, 100, 1), strict=True)}
    target = HuggingFace(foreign("p", "f", state), "t", file_bytes=40, overwrite=False)
    assert target.files == [["a", "b"], ["c"], ["d"]]
    assert target._name(1) == "model-00002-of-00003.safetensors"
    one = HuggingFace(foreign("p", "f", state), "t", file_bytes=1000, overwrite=False)
    large = {"large": torch.ones(100), "small": torch.ones(1)}
    first = HuggingFace(foreign("p", "f", large), "t", file_bytes=40, overwrite=False)
    assert first.files == [["large"], ["small"]]
    assert one._name(0) == "model.safetensors"


def test_the_layout_of_hugging_face_takes_only_tensors():
    state = {"w": torch.ones(1), "empty": {}, "step": 3}
    with pytest.raises(errors.StateError, match="only tensors") as raised:
        HuggingFace(foreign("p", "f", state), "t", file_bytes=40, overwrite=False)
    assert (raised.value.tensor, raised.value.actual) == ("step", "int")
    assert "--keys model" in raised.value.remedy
    del state["step"]
    HuggingFace(foreign("p", "f", state), "t", file_bytes=40, overwrite=False)


def with_dtype(path, dtype: str, size_bytes: int) -> None:
    """Write a safetensors file with a tensor `x` of any dtype, and another one `w`."""
    header = {
        "x": {"dtype": dtype, "shape": [2, 8], "data_offsets": [0, size_bytes]},
        "w": {"dtype": "U8", "shape": [1], "data_offsets": [size_bytes, size_bytes + 1]},
        "__metadata__": {"format": "pt", "author": "me", "tied": "w"},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(size_bytes + 1)))


@pytest.mark.skipif("F4X2" not in DTYPES, reason="torch lacks the dtype")
@pytest.mark.parametrize("target", ["b.safetensors", "hf", "state.safetensors"])
def test_pairs_of_four_bit_floats_are_read_and_written_as_safetensors_does(tmp_path, target):
    with_dtype(tmp_path / "a.safetensors", "F4", 8)
    names = {"rename": {"": "model"}} if target.startswith("state") else {}
    to = "hf" if target == "hf" else None
    report = convert(tmp_path / "a.safetensors", tmp_path / "c")
    assert report.left_out == {"metadata": "describes the file: author"}
    found = shardckpt.load_state(tmp_path / "c")["x"]
    convert(tmp_path / "c", tmp_path / target, to=to, **names)
    file = tmp_path / "hf" / "model.safetensors" if to else tmp_path / target
    (written,) = (tensor for name, tensor in load_file(file).items() if name.endswith("x"))
    for tensor in (found, written):
        assert (tensor.dtype, tensor.shape) == (torch.float4_e2m1fn_x2, (2, 4))
        assert tensor.view(torch.uint8).flatten().tolist() == list(range(8))
    with open_safetensors(str(tmp_path / "a.safetensors"), check=True) as source:
        part = source.read_box("x", (1, 1), (1, 2))
        assert part.view(torch.uint8).tolist() == [[5, 6]]


def test_tensors_of_dtypes_that_torch_lacks_are_left_out(tmp_path):
    with_dtype(tmp_path / "model.safetensors", "F6_E2M3", 12)
    for source in (tmp_path / "model.safetensors", tmp_path):
        report = convert(source, tmp_path / "c", overwrite=True)
        assert report.tensors == ("w", "tied")
        assert report.left_out["x"] == "a tensor of F6_E2M3, which torch does not have"
        assert report.left_out["metadata"] == "describes the file: author"


@pytest.mark.skipif("F4X2" not in DTYPES, reason="torch lacks the dtype")
def test_a_state_with_four_bit_floats_is_one_safetensors_file(tmp_path):
    packed = torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    write_one({"x": packed, "step": 1}, str(tmp_path / "a.safetensors"), overwrite=False)
    found = read_one(str(tmp_path / "a.safetensors"))
    assert found["step"] == 1
    assert found["x"].view(torch.uint8).tolist() == list(range(6))


def test_a_report_names_a_hundred_texts_of_a_file_at_most(tmp_path):
    texts = {f"text {number}": "" for number in range(1000)}
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata=texts)
    report = convert(tmp_path / "a.safetensors", tmp_path / "c")
    assert report.left_out["metadata"].count("text ") == 100
