"""save, load, load_state and open_checkpoint in one process."""

from __future__ import annotations

import collections
import enum
import math
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import shardckpt
from shardckpt import errors
from shardckpt.cli.main import main
from shardckpt.format.dtypes import DTYPES
from shardckpt.saving import rank_writer as shard_files


class Colour(enum.Enum):
    RED = 1


def a_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 12).reshape(3, 4)).square().sum().backward()
    optimizer.step()


def test_model_and_optimizer_come_back_bit_for_bit(tmp_path):
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    a_step(model, optimizer)
    shardckpt.save({"model": model, "optimizer": optimizer, "step": 1}, tmp_path / "c")
    other = a_model(1)
    fresh = torch.optim.AdamW(other.parameters())
    state = {"model": other, "optimizer": fresh, "step": 0}
    shardckpt.load(state, tmp_path / "c")
    assert state["step"] == 1
    assert str(fresh.state_dict()) == str(optimizer.state_dict())
    a_step(model, optimizer)
    a_step(other, fresh)
    for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_fresh_optimizer_is_saved_as_it_is(tmp_path):
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = str(optimizer.state_dict())
    shardckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "c")
    assert str(optimizer.state_dict()) == before
    used = a_model(1)
    stepped = torch.optim.AdamW(used.parameters(), lr=5.0)
    a_step(used, stepped)
    shardckpt.load({"model": used, "optimizer": stepped}, tmp_path / "c")
    assert str(stepped.state_dict()) == before


def test_parameter_groups_and_frozen_parameters(tmp_path):
    def job(seed):
        model = a_model(seed)
        model[1].requires_grad_(False)
        groups = [
            {"params": model[0].parameters(), "lr": 0.5 / (seed + 1)},
            {"params": model[2].parameters(), "weight_decay": 0.1 * seed},
        ]
        return model, torch.optim.SGD(groups, lr=0.25, momentum=0.9)

    model, optimizer = job(0)
    a_step(model, optimizer)
    shardckpt.save({"m": model, "o": optimizer}, tmp_path / "c")
    other, fresh = job(1)
    shardckpt.load({"m": other, "o": fresh}, tmp_path / "c")
    assert str(fresh.state_dict()) == str(optimizer.state_dict())


def test_names_have_no_prefixes_of_wrappers(tmp_path):
    compiled = torch.compile(a_model())
    optimizer = torch.optim.SGD(compiled.parameters(), momentum=0.9)
    shardckpt.save({"model": compiled, "o": optimizer}, tmp_path / "c")
    plain = a_model(1)
    shardckpt.load({"model": plain}, tmp_path / "c")
    assert torch.equal(plain[0].weight, compiled._orig_mod[0].weight)
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        assert not [name for name in checkpoint if "_orig_mod" in name]


VALUES = {
    "ints": {1: "a", 2: {3: [4, 5]}},
    "tuple": (1, (2.5, None), []),
    "nan": math.nan,
    "inf": -math.inf,
    "big": 2**100,
    "bytes": b"\0\xff",
    "dtype": torch.bfloat16,
    "size": torch.Size([2, 3]),
    "enum": Colour.RED,
    "numpy scalar": np.float32(1.5),
    "complex": 1 - 2j,
    "set": {1, 2},
    "empty": [{}, [], (), set()],
    "mixed keys": {(1, 2): True, "$x": 1, None: 2},
    "surrogate": "\ud800",
    "bool": False,
}


@pytest.mark.parametrize("name", VALUES)
def test_values_load_as_they_were_saved(name, tmp_path):
    shardckpt.save({"v": VALUES[name]}, tmp_path / "c")
    loaded = shardckpt.load_state(tmp_path / "c")["v"]
    assert repr(loaded) == repr(VALUES[name])
    assert type(loaded) is type(VALUES[name])
    state = {"v": None}
    shardckpt.load(state, tmp_path / "c")
    assert repr(state["v"]) == repr(VALUES[name])


@pytest.mark.filterwarnings("ignore")  # torch calls complex32 experimental
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_loads_bit_for_bit(dtype, tmp_path):
    raw = torch.arange(240, dtype=torch.uint8)
    tensor = (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)
    shardckpt.save(
        {"t": tensor, "zero": tensor[:1].reshape(()), "none": tensor[:0]}, tmp_path / "c"
    )
    loaded = shardckpt.load_state(tmp_path / "c")
    assert loaded["t"].dtype == dtype
    assert loaded["zero"].shape == ()
    assert loaded["none"].shape == (0,)
    assert torch.equal(loaded["t"].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.filterwarnings("ignore")  # torch warns of what it calls prototypes
def test_dtypes_that_can_not_be_saved_are_all_named(tmp_path):
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    state = {"a": {"b": quantized}, "c": torch.eye(2).to_sparse(), "fine": torch.ones(1)}
    with pytest.raises(errors.UnsupportedLeafError, match=r"c: torch\.sparse_coo") as caught:
        shardckpt.save(state, tmp_path / "c")
    assert caught.value.tensor == "a.b"
    assert os.listdir(tmp_path) == []


def test_a_dtype_that_safetensors_lacks_is_in_its_files_as_another(tmp_path):
    tensor = torch.complex(torch.arange(3.0), torch.ones(3)).to(torch.complex128)
    shardckpt.save({"t": tensor, "u": tensor[1:].conj()}, tmp_path / "c")
    held = safetensors.torch.load_file(tmp_path / "c" / "shard-00000-of-00001.safetensors")
    assert torch.equal(torch.view_as_complex(held["t"]), tensor)
    (tmp_path / "c" / "manifest.json").unlink()
    main(["rescue", str(tmp_path / "c"), str(tmp_path / "d")])
    found = shardckpt.load_state(tmp_path / "d")
    assert torch.equal(found["t"], tensor)
    assert torch.equal(found["u"], tensor[1:].conj())


def test_only_the_elements_of_a_view_are_saved(tmp_path):
    base = torch.randn(1000, 1000)
    state = {"rows": base[3:5], "columns": base[:, ::500], "flipped": base[:2, :3].t()}
    report = shardckpt.save(state, tmp_path / "c")
    assert report.bytes_by_rank[0] < 4096 + 4 * (2000 + 2000 + 6) + 1
    loaded = shardckpt.load_state(tmp_path / "c")
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
    target = {"columns": torch.zeros(1000, 4)[:, ::2]}
    shardckpt.load(target, tmp_path / "c")
    assert torch.equal(target["columns"], state["columns"])


def test_tied_tensors_are_written_once_and_tied_again(tmp_path):
    model = a_model()
    model.tied = model[0]
    report = shardckpt.save({"m": model, "again": model[0].weight}, tmp_path / "c")
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        assert len([n for n in checkpoint.manifest.tensors if n.endswith("weight")]) == 3
    loaded = shardckpt.load_state(tmp_path / "c")
    assert loaded["m"]["0.weight"] is loaded["m"]["tied.weight"] is loaded["again"]
    assert report.total_bytes


def test_meta_targets_get_memory_and_stay_tied(tmp_path):
    model = a_model()
    shardckpt.save({"m": model}, tmp_path / "c")
    with torch.device("meta"):
        target = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    shardckpt.load({"m": target}, tmp_path / "c")
    for mine, theirs in zip(model.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert all(not p.is_meta for p in target.parameters())


def test_numpy_arrays_in_place(tmp_path):
    shardckpt.save({"a": np.arange(6).reshape(2, 3)[:, ::-1], "b": np.array(2.5)}, tmp_path / "c")
    array = np.zeros((2, 3), dtype=np.int64)
    state = {"a": array, "b": np.array(0.0)}
    shardckpt.load(state, tmp_path / "c")
    assert state["a"] is array
    assert array.tolist() == [[2, 1, 0], [5, 4, 3]]
    assert shardckpt.load_state(tmp_path / "c")["b"] == 2.5


class Counter:
    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count, "history": torch.full((3,), float(self.count))}

    def load_state_dict(self, state):
        self.count = state["count"]
        self.history = state["history"]


def test_objects_with_state_dict(tmp_path):
    shardckpt.save(
        {"c": [Counter(5)], "named": collections.OrderedDict(x=Counter(6))}, tmp_path / "c"
    )
    state = {"c": [Counter()], "named": {"x": Counter()}}
    shardckpt.load(state, tmp_path / "c")
    assert (state["c"][0].count, state["named"]["x"].count) == (5, 6)
    assert state["c"][0].history.tolist() == [5, 5, 5]


def test_strict_lists_every_mismatch_and_changes_nothing(tmp_path):
    shardckpt.save(
        {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(2), "extra": 1}, tmp_path / "c"
    )
    state = {
        "a": torch.ones(2),
        "b": torch.ones(4),
        "c": torch.ones(2, dtype=torch.float64),
        "new": torch.ones(1),
    }
    with pytest.raises(errors.LoadMismatchError) as caught:
        shardckpt.load(state, tmp_path / "c")
    facts = caught.value.facts
    assert facts["missing"] == ("new",)
    assert facts["wrong_shape"] == (("b", [4], [3]),)
    assert facts["wrong_dtype"] == (("c", "torch.float64", "torch.float32"),)
    assert state["a"].tolist() == [1, 1]
    report = shardckpt.load(state, tmp_path / "c", strict=False)
    assert (report.missing, report.unexpected) == (("new",), ("extra",))
    assert state["a"].tolist() == [0, 0]
    assert state["b"].tolist() == [1, 1, 1, 1]


def test_a_module_must_take_all_that_was_saved(tmp_path):
    shardckpt.save({"m": a_model(), "other": torch.ones(2)}, tmp_path / "c")
    smaller = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    with pytest.raises(errors.LoadMismatchError) as caught:
        shardckpt.load({"m": smaller}, tmp_path / "c")
    assert set(caught.value.facts["unexpected"]) == {"m.2.weight", "m.2.bias"}
    report = shardckpt.load({"m": a_model(1)}, tmp_path / "c")
    assert report.unexpected == ("other",)


def test_cast_on_request(tmp_path):
    shardckpt.save({"a": torch.tensor([1.5, 2.5])}, tmp_path / "c")
    state = {"a": torch.zeros(2, dtype=torch.bfloat16)}
    report = shardckpt.load(state, tmp_path / "c", dtype="cast")
    assert state["a"].tolist() == [1.5, 2.5]
    assert report.cast == (("a", "torch.float32", "torch.bfloat16"),)


def test_keys_and_rename(tmp_path):
    model = a_model()
    shardckpt.save({"old": {"net": model}, "step": 3}, tmp_path / "c")
    target = a_model(1)
    shardckpt.load({"model": target}, tmp_path / "c", rename={"old.net": "model"})
    assert torch.equal(target[0].weight, model[0].weight)
    assert shardckpt.load_state(tmp_path / "c", keys="step") == {"step": 3}
    part = shardckpt.load_state(tmp_path / "c", keys=["old.*.bias"])
    assert list(part["old"]["net"]) == ["0.bias", "1.bias", "2.bias"]
    state = {"old": {"net": a_model(1)}, "step": 0}
    shardckpt.load(state, tmp_path / "c", keys="old.net.0")
    assert state["step"] == 0
    assert torch.equal(state["old"]["net"][0].weight, model[0].weight)
    assert not torch.equal(state["old"]["net"][2].weight, model[2].weight)


@pytest.mark.parametrize(
    "argument", [{"keys": ["model", "optmizer"]}, {"keys": "*.wieght"}, {"rename": {"mdoel": "m"}}]
)
def test_a_name_that_is_not_saved_is_an_error_in_keys_and_rename(argument, tmp_path):
    path = str(tmp_path / "c")
    shardckpt.save({"model": {"weight": torch.ones(2)}, "optimizer": {"step": 3}}, path)
    target = {"model": {"weight": torch.zeros(2)}, "optimizer": {"step": 0}}
    wrong = argument.get("keys", "mdoel")
    wrong = wrong[-1] if isinstance(wrong, list) else wrong
    calls = (
        lambda: shardckpt.load(target, path, **argument),
        lambda: shardckpt.load_state(path, **argument),
    )
    for call in calls:
        with pytest.raises(errors.LoadMismatchError) as caught:
            call()
        assert repr(wrong) in str(caught.value)
        assert caught.value.path == path
    assert target["model"]["weight"].tolist() == [0, 0]
    assert main(["inspect", path, "--keys", "model", wrong]) == errors.LoadMismatchError.exit_code
    shardckpt.load(target, path, strict=False, **argument)


def test_a_checkpoint_is_not_saved_inside_another_one(tmp_path):
    outer = tmp_path / "step-1"
    shardckpt.save({"n": 1}, outer)
    with pytest.raises(errors.StateError, match="inside another checkpoint"):
        shardckpt.save({"n": 2}, outer / "step-2")
    assert sorted(os.listdir(tmp_path)) == ["step-1"]
    assert shardckpt.load_state(outer) == {"n": 1}
    (tmp_path / "manifest.json").write_text('{"name": "of another program"}')
    shardckpt.save({"n": 3}, tmp_path / "step-3")
    assert shardckpt.load_state(tmp_path / "step-3") == {"n": 3}


def test_per_rank_in_one_process(tmp_path):
    shardckpt.save({"rng": shardckpt.PerRank({"t": torch.arange(3), "n": 4})}, tmp_path / "c")
    state = {"rng": shardckpt.PerRank({"t": torch.zeros(3, dtype=torch.int64), "n": 0})}
    shardckpt.load(state, tmp_path / "c")
    assert state["rng"].value["n"] == 4
    assert state["rng"].value["t"].tolist() == [0, 1, 2]
    assert shardckpt.load_state(tmp_path / "c")["rng"][0]["n"] == 4


def test_a_value_per_rank_is_not_the_tensor_of_its_number(tmp_path):
    state = {"own": shardckpt.PerRank(torch.ones(3)), "0": torch.zeros(3)}
    shardckpt.save(state, tmp_path / "c")
    found = {"own": torch.empty(3), "0": torch.empty(3)}
    shardckpt.load(found, tmp_path / "c")
    assert (found["own"].tolist(), found["0"].tolist()) == ([1, 1, 1], [0, 0, 0])


def test_shards_open_with_safetensors(tmp_path):
    tensor = torch.randn(5, 3)
    shardckpt.save({"a": {"t": tensor}, "half": tensor.half()}, tmp_path / "c")
    path = tmp_path / "c" / "shard-00000-of-00001.safetensors"
    with safetensors.safe_open(path, "pt") as shard:
        assert set(shard.keys()) == {"a.t", "half"}
        assert torch.equal(shard.get_tensor("a.t"), tensor)
        assert shard.metadata()["format"] == "shardckpt"


def test_async_save_takes_the_state_as_it_was(tmp_path):
    model = a_model()
    before = model[0].weight.detach().clone()
    handle = shardckpt.async_save({"m": model}, tmp_path / "c")
    handle.wait_staged(5)
    with torch.no_grad():
        model[0].weight.zero_()
    report = handle.result(30)
    assert handle.done()
    assert report.path == str(tmp_path / "c")
    assert torch.equal(shardckpt.load_state(tmp_path / "c")["m"]["0.weight"], before)


def test_async_save_raises_in_result(tmp_path):
    handle = shardckpt.async_save({"m": object()}, tmp_path / "c")
    with pytest.raises(errors.UnsupportedLeafError):
        handle.result(30)


def test_a_header_is_made_once_for_a_plan(tmp_path, monkeypatch):
    made = []
    make = shard_files.build_header
    monkeypatch.setattr(
        shard_files, "build_header", lambda *given: made.append(given) or make(*given)
    )
    for number, state in enumerate(
        (
            {"header": torch.ones(3)},
            {"header": torch.zeros(3)},
            {"header": torch.zeros(4)},
            {"header": torch.zeros(4, dtype=torch.int32)},
            {"another": torch.zeros(4, dtype=torch.int32)},
        )
    ):
        shardckpt.save(state, tmp_path / str(number))
        loaded = shardckpt.load_state(tmp_path / str(number))
        assert list(loaded) == list(state)
        for name, tensor in state.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].equal(tensor)
            shard = tmp_path / str(number) / "shard-00000-of-00001.safetensors"
            assert safetensors.torch.load_file(shard)[name].equal(tensor)
    assert len(made) == 4


def test_overwrite_replaces_only_checkpoints(tmp_path):
    shardckpt.save({"a": 1}, tmp_path / "c")
    with pytest.raises(errors.CheckpointExistsError):
        shardckpt.save({"a": 2}, tmp_path / "c")
    shardckpt.save({"a": 2}, tmp_path / "c", overwrite=True)
    assert shardckpt.load_state(tmp_path / "c") == {"a": 2}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(errors.NotACheckpointError):
        shardckpt.save({"a": 2}, tmp_path / "mine", overwrite=True)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    assert sorted(os.listdir(tmp_path)) == ["c", "mine"]


def test_an_empty_directory_may_be_there(tmp_path):
    shardckpt.save({"a": 1}, tmp_path)
    assert shardckpt.load_state(tmp_path) == {"a": 1}
