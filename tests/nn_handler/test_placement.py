"""A model is placed on the devices of a device map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.errors import LoadMismatchError, StateError
from shardckpt.nn_handler.placement import below_model, place
from shardckpt.storage.local import LocalStorage
from tests.nn_handler.models import Net, make


def test_a_typo_in_a_device_map_is_an_error(tmp_path):
    make().save(tmp_path / "a")
    with pytest.raises(StateError, match="bdoy"):
        NNHandler.load(tmp_path / "a", device_map={"": "cpu", "bdoy": "disk"})
    assert not NNHandler.load(tmp_path / "a", device_map="cpu").model.training


def test_a_model_of_other_sizes_on_a_device_map(tmp_path):
    state = NNHandler(nn.Linear, in_features=2, out_features=2).state()
    state["config"]["model"]["kwargs"] = {"in_features": 3, "out_features": 2}
    shardckpt.save(state, tmp_path / "c")
    with pytest.raises(errors.LoadMismatchError):
        NNHandler.load(tmp_path / "c", device_map="cpu")


def placed(path, cls=Net, *, device_map="cpu", strict=True) -> tuple[nn.Module, torch.device]:
    """Return a model that was placed from a handler's checkpoint, and the device of its inputs."""
    with torch.device("meta"):
        model = cls()
    found = place(model, cls, str(path), LocalStorage(), device_map=device_map, strict=strict)
    return model, found


class Longer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 3)


def test_a_device_map_gets_the_names_of_the_checkpoint():
    assert below_model({"": "cpu", "head": "disk", "layers.": "meta"}) == {
        "model": "cpu",
        "model.head": "disk",
        "model.layers": "meta",
    }
    assert below_model("auto") == "auto"
    assert below_model(None) is None


def test_a_placed_model_has_the_saved_tensors_and_new_buffers(tmp_path):
    handler = NNHandler(Net, device="cpu")
    handler.save(tmp_path / "c")
    model, inputs = placed(tmp_path / "c")
    assert inputs == torch.device("cpu")
    assert torch.equal(model.head.weight, handler.module.head.weight)
    assert model.scale.tolist() == [2.0]  # no checkpoint holds this buffer
    x = torch.ones(2, 4)
    assert torch.equal(model(x), handler.module(x))


def test_inputs_go_to_the_cpu_if_the_first_tensor_is_nowhere(tmp_path):
    NNHandler(Net, device="cpu").save(tmp_path / "c")
    model, inputs = placed(tmp_path / "c", device_map="meta")
    assert model.head.weight.is_meta
    assert inputs == torch.device("cpu")


def test_a_model_that_does_not_fit_is_an_error_or_a_warning(tmp_path):
    NNHandler(Net, device="cpu").save(tmp_path / "c")
    with pytest.raises(LoadMismatchError, match="does not fit") as caught:
        placed(tmp_path / "c", Longer)
    assert "extra.weight" in caught.value.actual
    assert "model_class=" in caught.value.remedy
    with pytest.warns(UserWarning, match=r"not in the checkpoint: extra\.weight, extra\.bias"):
        model, _ = placed(tmp_path / "c", Longer, strict=False)
    assert not model.head.weight.is_meta


def test_a_prefix_of_a_device_map_is_a_module_or_a_tensor(tmp_path):
    NNHandler(Net, device="cpu").save(tmp_path / "c")
    placed(tmp_path / "c", device_map={"": "cpu", "head.bias": "cpu", "layers.": "cpu"})
    with pytest.raises(StateError, match="parts that the model does not have") as caught:
        placed(tmp_path / "c", device_map={"": "cpu", "head.bia": "cpu", "neck": "cpu"})
    assert caught.value.actual == "'head.bia', 'neck'"
    assert "layers.0.weight" in caught.value.expected


def test_a_model_without_tensors_is_placed_on_the_cpu(tmp_path):
    NNHandler(nn.Identity, device="cpu").save(tmp_path / "c")
    _, inputs = placed(tmp_path / "c", nn.Identity)
    assert inputs == torch.device("cpu")
