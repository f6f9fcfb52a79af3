"""Loads and saves amid what programs do: default devices, inference_mode(), objects that refuse."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt


def trained(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("form", ["again", "again.pth", "again.safetensors", "dcp"])
def test_convert_on_another_default_device(tmp_path, form):
    shardckpt.save({"w": torch.arange(4.0)}, tmp_path / "c")
    with torch.device("meta"):
        to = "dcp" if form == "dcp" else None
        shardckpt.convert(tmp_path / "c", tmp_path / form, to=to)
        shardckpt.convert(tmp_path / form, tmp_path / "back")
        shardckpt.reshard(tmp_path / "back", tmp_path / "two", shards=2)
    assert shardckpt.load_state(tmp_path / "two")["w"].tolist() == [0, 1, 2, 3]


def test_load_on_another_default_device(tmp_path):
    state, fresh = trained(0), nn.Linear(2, 2)
    target = {"model": fresh, "optimizer": torch.optim.AdamW(fresh.parameters()), "rest": {}}
    shardckpt.save({**state, "rest": {"w": torch.arange(4.0)}}, tmp_path / "c")
    with torch.device("meta"):
        built = {"model": nn.Linear(2, 2)}
        shardckpt.load(target, tmp_path / "c")
        shardckpt.load(built, tmp_path / "c")
        with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
            rows = checkpoint["rest.w"][1:3]
    assert rows.tolist() == [1, 2]
    assert target["rest"]["w"].tolist() == [0, 1, 2, 3]
    assert torch.equal(built["model"].weight, state["model"].weight)
    for parameter in fresh.parameters():
        assert target["optimizer"].state[parameter]["step"].item() == 1


def test_load_in_inference_mode(tmp_path):
    """A loaded model can be trained afterwards."""
    shardckpt.save(trained(0), tmp_path / "c")
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.inference_mode():
        shardckpt.load({"model": model, "optimizer": optimizer}, tmp_path / "c")
        state = shardckpt.load_state(tmp_path / "c")
        with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
            rows = checkpoint["model.weight"][:1]
    assert not state["model"]["weight"].is_inference()
    assert not rows.is_inference()
    model(torch.ones(2)).sum().backward()
    optimizer.step()


@dataclasses.dataclass
class Job:
    model: nn.Module
    optimizer: torch.optim.Optimizer


HOLDERS = {
    "deque": lambda state: collections.deque(state.values(), 3),
    "deque of dicts": lambda state: collections.deque([state]),
    "dataclass": lambda state: Job(**state),
    "namespace": lambda state: types.SimpleNamespace(**state),
    "PerRank": lambda state: shardckpt.PerRank(dict(state)),
    "FromRank0": lambda state: shardckpt.FromRank0(dict(state)),
}


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_module_and_optimizer_in(tmp_path, name, asynchronous):
    state, target = trained(0), trained(1)
    save = shardckpt.async_save if asynchronous else shardckpt.save
    saved: Any = save({"x": HOLDERS[name](state)}, tmp_path / "c")
    if asynchronous:
        saved.result()
    shardckpt.load({"x": HOLDERS[name](target)}, tmp_path / "c")
    assert torch.equal(target["model"].weight, state["model"].weight)
    mine, theirs = (of["optimizer"].state_dict()["state"][0] for of in (target, state))
    assert torch.equal(mine["exp_avg"], theirs["exp_avg"])


def test_deque_of_tensors_takes_the_saved_length(tmp_path):
    shardckpt.save({"x": collections.deque([torch.ones(1)] * 3, 5)}, tmp_path / "c")
    state = {"x": collections.deque([torch.zeros(1)], 5)}
    shardckpt.load(state, tmp_path / "c")
    assert [t.item() for t in state["x"]] == [1, 1, 1]
    assert state["x"].maxlen == 5


class Renamed(nn.Module):
    """Holds a module under the name that torch.compile uses, beside a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = nn.Linear(2, 2)
        self.again = self._orig_mod
        self.weight = nn.Parameter(torch.randn(2, 2))


def test_module_named_as_that_of_a_wrapper(tmp_path):
    model, target = Renamed(), Renamed()
    shardckpt.save({"model": model}, tmp_path / "c")
    shardckpt.load({"model": target}, tmp_path / "c")
    for key, value in model.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_two_entries_of_a_module_with_one_name(tmp_path):
    wrapper = nn.Sequential()
    wrapper.x = torch.compile(nn.Linear(1, 1), backend="eager")
    wrapper.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({"x.weight": torch.zeros(1)})
    )
    with pytest.raises(shardckpt.errors.StateError, match=r"model\.x\.weight"):
        shardckpt.save({"model": wrapper}, tmp_path / "c")


class Windows:
    """Has state whose tensor may be a view in which elements share memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor = state["t"]


SHARING = {
    "expand": lambda: torch.zeros(1, 4).expand(3, 4),
    "unfold": lambda: torch.zeros(6).unfold(0, 4, 1),
    "as_strided": lambda: torch.zeros(6).as_strided((3, 4), (1, 1)),
}


@pytest.mark.parametrize("name", SHARING)
def test_elements_that_share_memory(tmp_path, name):
    saved = torch.arange(12.0).view(3, 4)
    shardckpt.save({"t": saved, "w": Windows(saved + 1)}, tmp_path / "c")
    with pytest.raises(shardckpt.errors.StateError, match="share memory"):
        shardckpt.load({"t": SHARING[name]()}, tmp_path / "c")
    holder = Windows(SHARING[name]())
    shardckpt.load({"w": holder}, tmp_path / "c")
    assert torch.equal(holder.tensor, saved + 1)


def test_transposed_and_sliced_tensors_are_filled(tmp_path):
    shardckpt.save({"t": torch.arange(6.0).view(2, 3)}, tmp_path / "c")
    for target in (
        torch.zeros(3, 2).t(),
        torch.zeros(4, 6)[::2, ::2],
        torch.zeros(2, 3, 1)[..., 0],
    ):
        shardckpt.load({"t": target}, tmp_path / "c")
        assert target.tolist() == [[0, 1, 2], [3, 4, 5]]


class Refusing:
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise self.error("planted")


class RefusingModule(nn.Linear):
    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        raise KeyError("planted")


class Unready(nn.Linear):
    def get_extra_state(self) -> Any:
        raise RuntimeError("planted")


class Own(Exception):
    pass


def test_objects_that_refuse_their_state(tmp_path):
    """Python's own exceptions become typed errors that name the entry, others pass."""
    shardckpt.save({"x": {"y": Refusing(ValueError)}}, tmp_path / "c")
    with pytest.raises(shardckpt.errors.StateError, match=r"x\.y[\s\S]*ValueError: planted"):
        shardckpt.load({"x": {"y": Refusing(ValueError)}}, tmp_path / "c")
    with pytest.raises(Own):
        shardckpt.load({"x": {"y": Refusing(Own)}}, tmp_path / "c")
    shardckpt.save({"m": nn.Linear(1, 1)}, tmp_path / "m")
    with pytest.raises(shardckpt.errors.StateError, match=r"tensor: m\n[\s\S]*KeyError"):
        shardckpt.load({"m": RefusingModule(1, 1)}, tmp_path / "m")
    for save in (shardckpt.save, lambda *given: shardckpt.async_save(*given).result()):
        with pytest.raises(
            shardckpt.errors.StateError, match=r"tensor: m\n[\s\S]*RuntimeError: planted"
        ):
            save({"m": Unready(1, 1)}, tmp_path / "n")


def test_state_of_another_optimizer(tmp_path):
    state = trained(0)
    shardckpt.save(state, tmp_path / "c")
    other = torch.optim.NAdam(state["model"].parameters())
    with pytest.raises(shardckpt.errors.StateError, match=r"optimizer[\s\S]*mu_product"):
        shardckpt.load({**state, "optimizer": other}, tmp_path / "c")


def test_state_of_an_optimizer_under_the_name_of_a_parameter(tmp_path):
    state = trained(0)
    state["optimizer"].state["weight"] = {"x": 1}
    with pytest.raises(shardckpt.errors.StateError, match=r"optimizer\.state\.weight"):
        shardckpt.save(state, tmp_path / "c")


def test_a_generator_refuses_what_is_no_state(tmp_path):
    zeros = torch.zeros_like(torch.Generator().get_state())
    shardckpt.save({"g": zeros}, tmp_path / "c")
    with pytest.raises(shardckpt.errors.StateError, match=r"tensor: g\n"):
        shardckpt.load({"g": torch.Generator()}, tmp_path / "c")


@dataclasses.dataclass
class Output(dict[str, Any]):
    """A dataclass that is a dict, as the outputs of transformers' models are."""

    loss: Any = None

    def __post_init__(self) -> None:
        if self.loss is not None:
            self["loss"] = self.loss


def test_a_dataclass_that_is_a_dict(tmp_path):
    shardckpt.save({"x": Output(torch.ones(1))}, tmp_path / "c")
    for state in ({"x": Output()}, {"x": Output(torch.zeros(1))}):
        shardckpt.load(state, tmp_path / "c")
        assert type(state["x"]) is Output
        assert state["x"]["loss"].item() == 1


def test_a_torch_file_names_the_entry_that_it_cannot_hold(tmp_path):
    shardckpt.save({"a": [1, {"queue": collections.deque([1])}], "b": 2}, tmp_path / "c")
    with pytest.raises(shardckpt.errors.UnsupportedLeafError, match=r"tensor: a\.1\.queue\n"):
        shardckpt.convert(tmp_path / "c", tmp_path / "c.pth")
