"""A handler is saved as one file, as several files, or as shards."""

from __future__ import annotations

import os
from fractions import Fraction

import pytest
from torch import nn

from shardckpt import NNHandler, errors
from shardckpt.nn_handler import Callback
from tests.nn_handler.models import Net, a_handler, same, train, weights, with_data


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.onnx", "model.pth.tar"])
def test_an_unknown_suffix_is_an_error(tmp_path, name):
    handler = a_handler()
    for call in (
        lambda: handler.save(tmp_path / name),
        lambda: handler.auto_save(save_path=tmp_path, name=name),
    ):
        with pytest.raises(errors.StateError, match="Unknown suffix"):
            call()
    assert os.listdir(tmp_path) == []
    handler.save(tmp_path / "loss_0.1234")
    assert os.listdir(tmp_path) == ["loss_0.1234"]


def test_some_components_in_files(tmp_path):
    handler = train(a_handler(), ema_decay=0.5)
    handler.save_multi_files(tmp_path / "c", keys_to_save=["model", "ema"])
    assert sorted(os.listdir(tmp_path / "c")) == ["components.json", "ema.pth", "model.pth"]
    from tests.nn_handler.models import Net

    made = NNHandler.initialize_from_checkpoint(tmp_path / "c", Net, width=6)
    assert same(weights(made), weights(handler))
    for wrong in (["modell"], "model"):
        with pytest.raises(errors.StateError, match="keys_to_save"):
            handler.save_multi_files(tmp_path / "d", keys_to_save=wrong)
    with pytest.raises(errors.NotACheckpointError, match="NNHandler"):
        NNHandler.load(tmp_path / "c")


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_split_files_load_completely(tmp_path, file_format):
    suffix = {"torch": ".pth", "safetensors": ".safetensors"}[file_format]
    handler = train(a_handler(), ema_decay=0.5)
    handler.save_multi_files(tmp_path / "many", file_format)
    handler.save_single_file(tmp_path / f"one{suffix}")
    NNHandler.save_multi_from_single(tmp_path / f"one{suffix}", tmp_path / "split", file_format)
    NNHandler.save_single_from_multi(tmp_path / "many", tmp_path / f"joined{suffix}")
    assert f"model{suffix}" in os.listdir(tmp_path / "many")
    train(handler)
    for name in ("many", f"one{suffix}", "split", f"joined{suffix}"):
        loaded = with_data(NNHandler.load(tmp_path / name))
        train(loaded)
        assert same(weights(loaded), weights(handler)), name
        assert same(loaded.ema.weights, handler.ema.weights), name
        assert loaded.history == handler.history
        weights_alone = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=6)
        assert weights_alone.epoch == 0
    handler.save_multi_files(tmp_path / "many", file_format)  # replaces
    assert NNHandler.load(tmp_path / "many").epoch == 2
    hurt = tmp_path / "many" / f"model{suffix}"
    hurt.write_bytes(hurt.read_bytes()[:-1] + b"?")
    with pytest.raises(errors.CorruptionError):
        NNHandler.load(tmp_path / "many")
    hurt.unlink()
    with pytest.raises(errors.NotACheckpointError):
        NNHandler.load(tmp_path / "many")


class Halves(Callback):
    """Its state is a value that torch.load refuses."""

    def state_dict(self):
        return {"half": Fraction(1, 2)}


def test_what_torch_load_refuses_is_not_written(tmp_path):
    handler = NNHandler(Net)
    handler.add_callback(Halves())
    with pytest.raises(errors.UnsupportedLeafError, match=r"torch\.load") as caught:
        handler.save(tmp_path / "c.pth")
    assert caught.value.tensor == "callbacks.0.state.half"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_names_of_255_bytes(tmp_path, suffix):
    handler = NNHandler(nn.Linear, device="cpu", in_features=2, out_features=2)
    path = tmp_path / ("x" * (255 - len(suffix)) + suffix)
    for _ in range(2):
        handler.save(path)
    NNHandler.load(path)
    assert os.listdir(tmp_path) == [path.name]


def test_files_of_the_user_beside_components_stay(tmp_path):
    handler = NNHandler(nn.Linear, device="cpu", in_features=2, out_features=2)
    folder = tmp_path / "parts"
    handler.save_multi_files(folder)
    handler.save_multi_files(folder, "safetensors")
    (folder / "tokenizer.json").write_text("precious")
    for damage in (False, True):
        if damage:
            (folder / "components.json").write_text("[]")
        with pytest.raises(errors.NotACheckpointError, match="would remove files") as caught:
            handler.save_multi_files(folder)
        assert "tokenizer.json" in caught.value.actual
    assert (folder / "tokenizer.json").read_text() == "precious"
