"""Folders of other libraries: converted entries, listed files, and refused folders."""

from __future__ import annotations

import json
import pickle
import sys
import time
import warnings

import pytest
import torch

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.cli.main import main
from shardckpt.convert.convert import convert
from tests.convert import layouts
from tests.convert.layouts import loaded, same_weights
from tests.nn_handler.models import Net

LIGHTNING_LEFT = {
    "hyper_parameters.args.loss": "holds an object of tests.convert.layouts.Loss",
    "hyper_parameters.loss": "holds an object of tests.convert.layouts.Loss",
}


@pytest.mark.parametrize("name", ["epoch=3.ckpt", "folder"])
def test_all_of_a_lightning_folder(tmp_path, name):
    model = Net(width=5)
    layouts.lightning_folder(tmp_path / name, model)
    report, state = loaded(tmp_path / name)
    assert same_weights(state["state_dict"], model)
    assert (state["epoch"], state["optimizer_0"]["lr"]) == (3, 0.1)
    assert state["callbacks"]["ModelCheckpoint{'monitor': None}"]["best_model_score"] == 0.5
    assert state["lr_schedulers"] == [{"last_epoch": 3, "_last_lr": [0.1]}]
    assert state["hyper_parameters"] == {"args": {"width": 5}, "root": "/data/x", "lr": 0.25}
    assert (report.source_format, report.writer) == ("DCP", "Lightning 2.6.6")
    assert report.files == (".metadata", "__0_0.distcp", "meta.pt")
    assert report.left_out == LIGHTNING_LEFT
    assert report.changed == {
        "hyper_parameters.args": "argparse.Namespace, taken as dict",
        "hyper_parameters.root": "pathlib.PosixPath, taken as text",
    }
    assert "state_dict.head.weight" in report.tensors
    assert {"epoch", "lr_schedulers.0.last_epoch"} <= set(report.values)


def test_a_meta_pt_that_can_not_be_read_is_listed(tmp_path):
    layouts.lightning_folder(tmp_path / "c", Net(width=5))
    (tmp_path / "c" / "meta.pt").write_bytes(b"PK\3\4 and nothing more")
    report, state = loaded(tmp_path / "c")
    assert state.keys() == {"state_dict", "optimizer_0"}
    assert "pass this path" not in report.left_out["meta.pt"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_lightning_file(tmp_path, legacy):
    model = Net(width=5)
    layouts.lightning_file(tmp_path / "last.ckpt", model)
    if legacy:
        state = torch.load(tmp_path / "last.ckpt", weights_only=False)
        torch.save(state, tmp_path / "last.ckpt", _use_new_zipfile_serialization=False)
    report, state = loaded(tmp_path / "last.ckpt")
    assert same_weights(state["state_dict"], model)
    assert torch.equal(
        state["optimizer_states"][0]["state"][0]["exp_avg"],
        torch.full_like(next(model.parameters()), 0.1),
    )
    assert report.left_out == LIGHTNING_LEFT
    assert report.writer == "Lightning 2.6.6"


TRAINER_LEFT = {
    "config.json",
    "generation_config.json",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "trainer_state.json",
    "training_args.bin",
}


def test_the_folder_of_a_trainer(tmp_path, capsys):
    model, folder = Net(width=5), tmp_path / "checkpoint-2"
    layouts.trainer_folder(folder, model)
    report, state = loaded(folder)
    assert same_weights(state, model)
    assert report.left_out.keys() == TRAINER_LEFT
    assert report.writer == "transformers' Trainer"
    assert main(["convert", str(folder), str(tmp_path / "d")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(name in line for line in lines if " left " in line) for name in TRAINER_LEFT)
    assert main(["convert", str(folder), str(tmp_path / "e"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == report.left_out


@pytest.mark.parametrize("safe", [True, False])
def test_the_folder_of_accelerate(tmp_path, safe):
    model = Net(width=5)
    layouts.accelerate_folder(tmp_path / "c", model, safe=safe)
    report, state = loaded(tmp_path / "c")
    assert same_weights(state, model)
    names = {"custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"}
    assert report.left_out.keys() == names
    assert report.writer == "accelerate"
    _, state = loaded(tmp_path / "c" / "random_states_0.pkl")
    assert state["step"] == 7


def test_the_folders_of_fsdp(tmp_path):
    model = Net(width=5)
    layouts.fsdp_folder(tmp_path / "c", model)
    report, state = loaded(tmp_path / "c")
    assert same_weights(state["model"], model)
    assert state["optimizer"]["state"]["w"].tolist() == [1, 1]
    assert report.left_out.keys() == {"random_states_0.pkl", "scheduler.bin"}
    assert report.writer == "accelerate"


WEIGHTS = {
    "last.ckpt": layouts.lightning_file,
    "pytorch_model.bin": lambda path, model: torch.save(model.state_dict(), path),
    "model_best.pth.tar": lambda path, model: torch.save({"state_dict": model.state_dict()}, path),
    "sharded.ckpt": layouts.lightning_folder,
    "trainer": layouts.trainer_folder,
    "accelerate": layouts.accelerate_folder,
    "bin": lambda path, model: layouts.bin_folder(path, model, files=1),
    "bins": lambda path, model: layouts.bin_folder(path, model, files=3),
    "fsdp": layouts.fsdp_folder,
    "megatron": layouts.megatron_folder,
    "newer": layouts.newer_torch_folder,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_handler_begins_with_the_weights_of_any_of_them(tmp_path, name):
    model = Net(width=5)
    WEIGHTS[name](tmp_path / name, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handler = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, "cpu", width=5)
    assert same_weights(handler.module.state_dict(), model)


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin"])
def test_targets_named_as_torch_files(tmp_path, name):
    shardckpt.save({"w": torch.ones(2), "n": 1}, tmp_path / "c")
    report = convert(str(tmp_path / "c"), str(tmp_path / name))
    assert report.target_format == "torch"
    assert torch.load(tmp_path / name, weights_only=True)["n"] == 1
    _, state = loaded(tmp_path / name)
    assert state["w"].tolist() == [1, 1]
    convert(str(tmp_path / "c"), str(tmp_path / "e" / name), to="dcp")
    assert convert(str(tmp_path / "e" / name), str(tmp_path / "f")).source_format == "DCP"


def test_a_folder_of_megatron_is_converted(tmp_path):
    model = Net(width=5)
    layouts.megatron_folder(tmp_path / "c", model)
    report, state = loaded(tmp_path / "c")
    assert not [name for name in sys.modules if name.startswith("megatron")]
    assert same_weights({k[6:]: v for k, v in state.items() if k[:6] == "model."}, model)
    assert (state["iteration"], state["args"]) == (100, {"tp": 1})
    assert report.writer == "Megatron-Core"
    assert report.left_out.keys() == {".metadata: mcore_data", "backend", "metadata.json"}
    assert "megatron.core" in report.left_out["backend"]


def test_dcp_of_a_newer_torch(tmp_path):
    model = Net(width=5)
    layouts.newer_torch_folder(tmp_path / "c", model)
    report, state = loaded(tmp_path / "c")
    assert same_weights(state["model"], model)
    assert state["step"] == 5
    assert report.left_out.keys() == {".metadata: layout_version", "odd"}
    assert "torch.distributed.checkpoint.encodings.TensorEncoding" in report.left_out["odd"]


def test_dcp_of_torch_2_2(tmp_path):
    """Its TensorProperties were another module's."""
    layouts.write_dcp({"w": torch.ones(3)}, tmp_path / "c")
    path = tmp_path / "c" / ".metadata"
    text = pickle.dumps(pickle.loads(path.read_bytes()), protocol=2)
    new, old = "distributed.checkpoint", "distributed._shard.sharded_tensor"
    for name in ("TensorProperties", "_MEM_FORMAT_ENCODING"):
        before = f"torch.{new}.metadata\n{name}\n".encode()
        assert before in text
        text = text.replace(before, f"torch.{old}.metadata\n{name.lstrip('_')}\n".encode())
    path.write_bytes(text)
    _, state = loaded(tmp_path / "c")
    assert state["w"].tolist() == [1, 1, 1]


FOLDERS = {
    "DeepSpeed": ["latest", "zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt"],
    "Megatron-LM": ["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"],
    "use_collectives": ["__0.metadata", "__0_0.distcp"],
    "did not end": ["__0_0.distcp", "__1_0.distcp"],
    "consolidate": ["shard-00001-model-00001-of-00001.safetensors"],
    "FSDP weights in one file": ["pytorch_model_fsdp.bin", "optimizer.bin"],
    "Llama": ["consolidated.00.pth", "consolidated.01.pth", "params.json"],
    "another framework": ["saved_model.pb", "variables/variables.index"],
    "checkpoint-20": ["checkpoint-20/model.safetensors", "checkpoint-30/model.safetensors"],
    "checkpoint-5": ["checkpoint-5/latest", "checkpoint-5/zero_to_fp32.py"],
    "a.ckpt, b.ckpt": ["a.ckpt/.metadata", "b.ckpt"],
    "iter_0000010": ["latest_checkpointed_iteration.txt", "iter_0000010/.metadata"],
    "weights": ["weights/.metadata", "context/model.yaml"],
    "unet": ["model_index.json", "unet/diffusion_pytorch_model.safetensors"],
    "best.ckpt": ["best.ckpt", "hparams.yaml"],
}


@pytest.mark.parametrize("text", FOLDERS)
def test_folders_that_are_refused_say_what_they_are(tmp_path, text):
    for name in FOLDERS[text]:
        path = tmp_path / "c" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    started = time.process_time()
    with pytest.raises(errors.NotACheckpointError) as caught:
        convert(str(tmp_path / "c"), str(tmp_path / "d"))
    assert text in str(caught.value)
    assert caught.value.remedy
    assert time.process_time() - started < 1


def test_values_by_rank_are_listed_as_changed(tmp_path):
    shardckpt.save({"w": torch.ones(2), "rng": shardckpt.PerRank(5)}, tmp_path / "c")
    report = convert(str(tmp_path / "c"), str(tmp_path / "x.pt"))
    assert report.changed.keys() == {"rng"}
