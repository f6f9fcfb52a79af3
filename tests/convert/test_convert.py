"""shardckpt convert: from every format to every format, bit for bit, and the refused entries."""

from __future__ import annotations

import inspect
import json
import os
import pickle

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main
from shardckpt.convert.convert import convert
from shardckpt.convert.opening import open_source
from shardckpt.convert.single_files import read_one, write_many
from shardckpt.io.buffers import BUFFER_BYTES
from tests.convert.states import plain, whole_state

pytestmark = pytest.mark.filterwarnings("ignore")  # DCP's, of one process


@pytest.mark.parametrize("target", ["x.pt", "x.safetensors", "dcp"])
def test_a_complete_state_goes_and_comes_back(tmp_path, saved, target):
    path = str(tmp_path / target)
    convert(saved, path, **({"to": "dcp", "shards": 3} if target == "dcp" else {}))
    convert(path, str(tmp_path / "back"), shards=2)
    back = shardckpt.load_state(tmp_path / "back")
    assert plain(back) == plain(whole_state())
    with shardckpt.open_checkpoint(tmp_path / "back") as checkpoint:
        checkpoint.verify()
        assert len(checkpoint.manifest.shards) == 2
        assert checkpoint.manifest.notes["converted"].startswith("from ")
    if target != "dcp":
        assert plain(read_one(path)) == plain(whole_state())
        assert back["model"]["tied"] is back["model"]["layers.0.weight"]


def test_files_that_others_wrote(tmp_path):
    tensors = {"a.b": torch.arange(6.0).reshape(2, 3), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    torch.save({"a": {"b": tensors["a.b"]}, "n": [1, None]}, tmp_path / "x.pt")
    write_many({"a": {"b": tensors["a.b"]}, "n": 3}, str(tmp_path / "m"), "torch", overwrite=False)
    want = {
        "x.safetensors": tensors,
        "hf": tensors,
        "x.pt": {"a": {"b": tensors["a.b"]}, "n": [1, None]},
        "m": {"a": {"b": tensors["a.b"]}, "n": 3},
    }
    for name, state in want.items():
        convert(str(tmp_path / name), str(tmp_path / f"{name}-converted"))
        assert plain(shardckpt.load_state(tmp_path / f"{name}-converted")) == plain(state)


def test_like_another_checkpoint(tmp_path):
    """The result of a training as the folder from which the training began."""
    began = tmp_path / "began"
    began.mkdir()
    before = {
        "a.weight": torch.zeros(2, 3).bfloat16(),
        "b.bias": torch.zeros(4),
        "n": torch.ones(1),
    }
    save_file(before, began / "model.safetensors", {"format": "pt"})
    (began / "config.json").write_text("{}")
    model = {"a.weight": torch.full((2, 3), 0.1), "b": {"bias": torch.ones(4)}, "n": torch.ones(1)}
    shardckpt.save({"model": {**model, "extra": torch.ones(1)}, "step": 7}, tmp_path / "trained")
    target = tmp_path / "target"
    command = ["convert", str(tmp_path / "trained"), str(target), "--format", "hf"]
    assert main([*command, "--rename", "model=", "--like", str(began)]) == 0
    (file,) = target.glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == before.keys()
    assert torch.equal(found["a.weight"], torch.full((2, 3), 0.1).bfloat16())
    assert torch.equal(found["b.bias"], torch.ones(4))
    assert (target / "config.json").read_text() == "{}"

    options = {"rename": {"model": ""}, "like": began}
    report = convert(tmp_path / "trained", tmp_path / "plain", **options)
    assert {"extra", "step"} <= report.left_out.keys()
    assert shardckpt.load_state(tmp_path / "plain").keys() == before.keys()
    with pytest.raises(errors.StateError, match="exclude each other"):  # it would round twice
        convert(tmp_path / "trained", tmp_path / "no", dtype="float16", **options)
    for change in ({"b": {"bias": torch.ones(5)}}, {"b": {}}, {"n": torch.ones(1).long()}):
        other = tmp_path / "other"
        shardckpt.save({"model": {**model, **change}}, other, overwrite=True)
        with pytest.raises(errors.LoadMismatchError, match="does not have the tensors") as caught:
            convert(other, tmp_path / "no", **options)
        assert ("n: " if "n" in change else "b.bias: ") in str(caught.value)


@pytest.mark.parametrize("target", ["x.pt", "x.safetensors", "dcp"])
def test_numpy_arrays_stay_arrays_where_no_pickle_is_needed(tmp_path, target):
    """They stay arrays where no unpickling is needed for it, else they are tensors."""
    shardckpt.save({"a": np.arange(3.0), "t": (np.arange(2), 1)}, tmp_path / "c")
    convert(str(tmp_path / "c"), str(tmp_path / target), to="dcp" if target == "dcp" else None)
    convert(str(tmp_path / target), str(tmp_path / "back"))
    back = shardckpt.load_state(tmp_path / "back")
    kind = np.ndarray if target == "x.safetensors" else torch.Tensor
    assert isinstance(back["a"], kind)
    assert isinstance(back["t"][0], kind)
    assert (back["a"].tolist(), back["t"][0].tolist()) == ([0.0, 1.0, 2.0], [0, 1])


@pytest.mark.parametrize("target", ["shardckpt", "hf", "x.safetensors"])
def test_memory_is_a_few_buffers(tmp_path, monkeypatch, target):
    """No part that is read at once is larger than one."""
    w = torch.zeros(3 * BUFFER_BYTES // 4)
    torch.save({"w": w}, tmp_path / "x.pt")
    asked = []
    with open_source(str(tmp_path / "x.pt")) as source:
        read = type(source).read_box
    monkeypatch.setattr(
        type(source),
        "read_box",
        lambda self, name, offsets, sizes: (
            asked.append(sizes[0] * 4) or read(self, name, offsets, sizes)
        ),
    )
    to = None if "." in target else target
    convert(str(tmp_path / "x.pt"), str(tmp_path / target), to=to)
    assert max(asked) <= BUFFER_BYTES
    assert sum(asked) in (w.nbytes, 2 * w.nbytes)


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK"],)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def hostile(tmp_path, kind: str) -> str:
    """A source of which nothing can be read."""
    path = tmp_path / "source"
    tensors = {"w": torch.arange(100.0)}
    if kind in ("pickled.pt", "cut.pt", "list.pt"):
        states = {"pickled.pt": {"x": Attack()}, "cut.pt": tensors, "list.pt": [1]}
        path = tmp_path / kind
        torch.save(states[kind], path)
    elif kind == "dcp value":
        dcp.save({**tensors, "x": Attack()}, checkpoint_id=path)
    elif kind in ("dcp metadata", "dcp shape", "dcp file"):
        dcp.save(tensors, checkpoint_id=path)
        if kind == "dcp metadata":
            (path / ".metadata").write_bytes(pickle.dumps(Attack()))
        elif kind == "dcp shape":
            found = pickle.loads((path / ".metadata").read_bytes())  # our own
            found.state_dict_metadata["w"].size = torch.Size([1 << 50])
            (path / ".metadata").write_bytes(pickle.dumps(found))
        else:
            (path / "__0_0.distcp").write_bytes(bytes(2000))
    elif kind in ("hf index", "hf file", "hf missing"):
        shardckpt.save(tensors, tmp_path / "c")
        convert(str(tmp_path / "c"), str(path), to="hf")
        index = {"weight_map": {"other": "model.safetensors"}}
        if kind != "hf file":
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        if kind == "hf file":
            cut(path / "model.safetensors")
        elif kind == "hf missing":
            (path / "model.safetensors").unlink()
    elif kind in ("flipped.safetensors", "tree.safetensors"):
        path = tmp_path / kind
        shardckpt.save(tensors, tmp_path / "c")
        convert(str(tmp_path / "c"), str(path))
        if kind == "tree.safetensors":
            save_file(tensors, path, {"shardckpt.state": '{"w":{"$tensor":"other"}}'})
        else:
            data = bytearray(path.read_bytes())
            data[-5] ^= 4
            path.write_bytes(data)
    if kind == "cut.pt":
        cut(path)
    return str(path)


HOSTILE = {
    "pickled.pt": errors.CorruptionError,
    "cut.pt": errors.CorruptionError,
    "list.pt": errors.NotACheckpointError,
    "dcp value": errors.CorruptionError,
    "dcp metadata": errors.CorruptionError,
    "dcp shape": errors.CorruptionError,
    "dcp file": errors.CorruptionError,
    "hf index": errors.CorruptionError,
    "hf file": errors.CorruptionError,
    "hf missing": errors.CheckpointError,
    "flipped.safetensors": errors.CorruptionError,
    "tree.safetensors": errors.CorruptionError,
    "nothing": errors.CheckpointNotFoundError,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_source_that_can_not_be_read(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("ATTACK", str(tmp_path / "owned"))
    source = hostile(tmp_path, kind)
    with pytest.raises(HOSTILE[kind]) as caught:
        convert(source, str(tmp_path / "target"))
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "owned").exists()
    left = {"source", "c", kind}
    assert set(os.listdir(tmp_path)) <= left


def test_what_a_target_can_not_hold(tmp_path, saved, capsys):
    target = str(tmp_path / "t")
    with pytest.raises(errors.StateError, match="optimizer"):
        convert(saved, target, to="hf")
    with pytest.raises(errors.StateError, match=r"\.pt"):
        convert(saved, target, to="torch")
    with pytest.raises(errors.StateError, match=r"\.pt"):
        convert(saved, str(tmp_path / "x.pt"), to="dcp")
    with pytest.raises(errors.StateError, match="number of shards"):
        convert(saved, target, shards=0)
    with pytest.raises(errors.LoadMismatchError, match="keys= names 'modell'"):
        convert(saved, target, keys=["model", "modell"])
    with pytest.raises(errors.LoadMismatchError, match="No entry of this checkpoint is selected"):
        convert(saved, target, keys=[])
    with pytest.raises(errors.LoadMismatchError, match="rename= names 'modell'"):
        convert(saved, target, rename={"modell": "m"})
    with pytest.raises(errors.StateError, match="Unknown suffix"):
        convert(saved, str(tmp_path / "x.npz"))
    shardckpt.save({"kind": inspect.Parameter.KEYWORD_ONLY}, tmp_path / "c")
    with pytest.raises(errors.UnsupportedLeafError, match=r"x\.pt"):
        convert(str(tmp_path / "c"), str(tmp_path / "x.pt"))
    assert os.listdir(tmp_path) == ["c"]
    for wrong in (["--max-file-size", "big"], ["--rename", "model"], ["--format", "onnx"]):
        with pytest.raises(SystemExit):
            main(["convert", saved, target, *wrong])
    assert "5GB" in capsys.readouterr().err


def test_numbers_of_numpy_become_numbers_of_python_in_torch_files(tmp_path):
    state = {"lr": np.float32(0.1), "all": [np.int64(3), (np.bool_(True), np.str_("a"))], "n": 2}
    shardckpt.save(state, tmp_path / "c")
    report = shardckpt.convert(tmp_path / "c", tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found == {"lr": float(np.float32(0.1)), "all": [3, (True, "a")], "n": 2}
    assert report.changed.keys() == {"lr", "all.0", "all.1.0", "all.1.1"}
    assert report.changed["lr"] == "numpy.float32, taken as a value of Python"
