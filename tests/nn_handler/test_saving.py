"""A handler is saved as one file, as several files, or as shards."""

from __future__ import annotations

import os
from fractions import Fraction

import msgspec
import pytest
import torch
from torch import nn

from shardckpt import NNHandler, errors
from shardckpt.nn_handler import Callback, saving
from shardckpt.nn_handler.saving import OneFile, check_config, link, state_on_all
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


def test_a_link_replaces_an_earlier_one(tmp_path):
    (tmp_path / f".last.{os.getpid()}.link").symlink_to("left over")
    for target in ("epoch1", "epoch2"):
        link(str(tmp_path), "last", target)
        assert os.readlink(tmp_path / "last") == target
    assert os.listdir(tmp_path) == ["last"]


def test_a_link_replaces_no_file(tmp_path):
    (tmp_path / "last").write_text("precious")
    with pytest.raises(errors.StorageError, match="name of the link is taken"):
        link(str(tmp_path), "last", "epoch1")
    assert (tmp_path / "last").read_text() == "precious"


@pytest.mark.parametrize("path", ["c", "c.bin", "c.safetensors.gz"])
def test_a_single_file_has_a_known_suffix(tmp_path, path):
    with pytest.raises(errors.StateError, match="suffix of a single file") as caught:
        NNHandler(Net).save_single_file(tmp_path / path)
    assert caught.value.path == str(tmp_path / path)


def test_a_file_is_replaced_only_if_it_may_be(tmp_path):
    handler = NNHandler(Net)
    handler.save_single_file(tmp_path / "c.pth", overwrite=False)
    before = (tmp_path / "c.pth").stat().st_ino
    with pytest.raises(errors.CheckpointExistsError):
        handler.save_single_file(tmp_path / "c.pth", overwrite=False)
    assert (tmp_path / "c.pth").stat().st_ino == before
    handler.save_single_file(tmp_path / "c.pth")
    assert (tmp_path / "c.pth").stat().st_ino != before


def test_a_format_of_component_files_is_torch_or_safetensors(tmp_path):
    NNHandler(Net).save(tmp_path / "c.pth")
    with pytest.raises(errors.StateError, match="Invalid value for file_format") as caught:
        NNHandler.save_multi_from_single(tmp_path / "c.pth", tmp_path / "many", "pickle")
    assert caught.value.actual == "'pickle'"
    assert os.listdir(tmp_path) == ["c.pth"]


class Tied(nn.Module):
    """Two names of one tensor, and a small part of a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Parameter(torch.ones(3))
        self.register_buffer("part", torch.zeros(100_000)[:2])


def test_tied_tensors_stay_tied_and_unused_memory_is_left_out(tmp_path):
    NNHandler(Tied, device="cpu").save(tmp_path / "c.pth")
    found = torch.load(tmp_path / "c.pth", weights_only=True)["model"]
    assert found["one"].data_ptr() == found["other"].data_ptr()
    assert found["part"].untyped_storage().nbytes() == 8
    assert (tmp_path / "c.pth").stat().st_size < 100_000


def test_ranks_with_other_distributed_tensors_are_named():
    def payload(**tensors: str) -> bytes:
        return msgspec.msgpack.encode(list(tensors.items()))

    own = payload(a="float32 [2]", b="float32 [3]")
    saving._check_alike([own, own])
    with pytest.raises(errors.RankMismatchError, match="different distributed tensors") as caught:
        saving._check_alike([own, own, payload(a="float32 [2]", b="int8 [3]")])
    assert (caught.value.rank, caught.value.tensor) == (2, "b")
    assert (caught.value.expected, caught.value.actual) == ("float32 [3]", "int8 [3]")
    with pytest.raises(errors.RankMismatchError):
        saving._check_alike([own, payload(b="float32 [3]", a="float32 [2]")])  # in another order


class FailsToSave(Callback):
    def state_dict(self):
        raise ValueError("planted")


def test_the_state_of_all_ranks_or_an_error():
    handler = a_handler()
    state = state_on_all(handler)
    assert state["model"] is handler.model
    assert {"optimizer", "scheduler", "progress", "callbacks", "ranks", "config"} <= set(state)
    handler.add_callback(FailsToSave())
    with pytest.raises(ValueError, match="planted"):
        state_on_all(handler)


class Takes(Callback):
    def __init__(self, value) -> None:
        self.value = value


def test_arguments_that_a_torch_file_can_not_hold_are_refused_before_training():
    handler = NNHandler(Net)
    handler.add_callback(Takes(Fraction(1, 2)))
    check_config(handler, "c.safetensors")
    with pytest.raises(errors.UnsupportedLeafError) as caught:
        check_config(handler, "c.pth")
    assert "callbacks.0.args.0" in caught.value.tensor


def test_single_files_are_the_checkpoints_of_a_manager(tmp_path):
    backend, path = OneFile(), str(tmp_path / "a.pth")
    handler = NNHandler(Net)
    options = {"overwrite": False, "process_group": None, "base": None}
    with pytest.raises(errors.StateError, match="not saved in the background") as caught:
        backend.save(handler.state(), path, asynchronous=True, **options)
    assert caught.value.path == path
    assert backend.names(str(tmp_path / "nowhere")) == []
    assert backend.save(handler.state(), path, asynchronous=False, **options) is None
    (tmp_path / ".hidden").touch()
    (tmp_path / "last.pth").symlink_to("a.pth")
    (tmp_path / "b.txt").touch()
    assert backend.names(str(tmp_path)) == ["a.pth", "b.txt"]
    assert backend.exists(path)
    assert backend.record(path) is None  # saved by no manager
    with pytest.raises(errors.NotACheckpointError):
        backend.record(str(tmp_path / "b.txt"))
    version = backend.version(path)
    backend.verify(path, quick=False, progress=lambda count: None)
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.index(handler.module.head.weight.detach().numpy().tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    assert backend.version(path) != version
    with pytest.raises(errors.CorruptionError):
        backend.verify(path, quick=False, progress=lambda count: None)
    backend.remove(path)
    assert not backend.exists(path)
    with pytest.raises(errors.ShardckptError, match=r"a\.pth"):
        backend.remove(path)
