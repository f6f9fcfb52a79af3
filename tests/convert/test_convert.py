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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main
from shardckpt.convert.convert import convert
from shardckpt.convert.dcp import DcpCheckpoint
from shardckpt.convert.opening import open_source
from shardckpt.convert.single_files import read_one, write_many
from shardckpt.convert.sources import Selected
from shardckpt.format.dtype_names import shard_form
from shardckpt.format.dtypes import DTYPES
from shardckpt.io.buffers import BUFFER_BYTES

pytestmark = pytest.mark.filterwarnings("ignore")  # DCP's, of one process


SAFETENSORS = {n: dtype for n, dtype in DTYPES.items() if shard_form(n, ()) == (n, ())}


def model() -> dict:
    """A state with every dtype, NaN, views, scalars, empty tensors and tied tensors."""
    raw = torch.arange(0, 6 * 16 * 7, 7).to(torch.uint8).reshape(6, 16)
    tensors = {name: raw.view(dtype) for name, dtype in SAFETENSORS.items() if name != "BOOL"}
    weight = torch.arange(400_000.0).reshape(500, 800)
    return {
        **tensors,
        "bool": raw > 99,
        "layers.0.weight": weight,
        "tied": weight,
        "turned": weight[:7].T,
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 3),
    }


def whole_state() -> dict:
    moments = [{"m": torch.ones(3), "step": 1}, {"m": torch.zeros(3), "step": 2}]
    values = {"lr": float("-inf"), "betas": (0.9, 0.999), "name": "adam"}
    return {"model": model(), "optimizer": {"state": moments, **values}, "step": 7}


def bits(tensor: torch.Tensor) -> tuple:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def plain(value):
    """Comparable, to the bit; dicts without their order, which not every format keeps."""
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return type(value), value


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    shardckpt.save(whole_state(), path)
    return str(path)


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


def test_torch_reads_the_dcp_directory(tmp_path, saved):
    convert(saved, str(tmp_path / "dcp"), to="dcp", shards=3)
    names = set(os.listdir(tmp_path / "dcp"))
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"}
    state = whole_state()
    state["model"] = {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}
    state["step"] = 0
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert plain(state) == plain(whole_state())
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "x.pt")
    assert plain(torch.load(tmp_path / "x.pt", weights_only=True)) == plain(whole_state())


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


def test_what_ranks_had_of_their_own(tmp_path):
    own = shardckpt.PerRank({"seed": 5, "state": torch.arange(3), "array": np.arange(2)})
    shardckpt.save({"w": torch.ones(2), "rng": own, "other": own}, tmp_path / "c")
    convert(str(tmp_path / "c"), str(tmp_path / "d"), keys=["rng", "w"], rename={"w": "v"})
    with shardckpt.open_checkpoint(tmp_path / "d") as checkpoint:
        assert set(checkpoint) == {"v", "rng"}
        assert set(checkpoint.manifest.tensors) == {"v", "rng.state@rank0", "rng.array@rank0"}
    back = {"v": torch.zeros(2), "rng": shardckpt.PerRank({"seed": 0, "state": 0, "array": 0})}
    shardckpt.load(back, tmp_path / "d")
    assert back["rng"].value["state"].tolist() == [0, 1, 2]
    convert(str(tmp_path / "c"), str(tmp_path / "x.safetensors"), keys="rng")
    (listed,) = read_one(str(tmp_path / "x.safetensors"))["rng"]
    assert (listed["seed"], listed["array"].tolist()) == (5, [0, 1])


def test_boxes_of_a_dcp_tensor_lie_in_several_parts(tmp_path):
    tensor = torch.arange(7 * 9).reshape(7, 9)
    shardckpt.save({"w": torch.arange(400_000.0), "t": tensor}, tmp_path / "c")
    convert(str(tmp_path / "c"), str(tmp_path / "d"), to="dcp", shards=3)
    found = DcpCheckpoint(str(tmp_path / "d"))
    assert found.read_box("w", (100,), (399_000,)).tolist() == list(range(100, 399_100))
    assert torch.equal(found.read_box("t", (2, 3), (4, 5)), tensor[2:6, 3:8])


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
