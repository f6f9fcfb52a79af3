"""The Trainer: saved on 2 ranks, and resumed in new processes on 2 and on 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import shardckpt
from tests.integrations.jobs import job
from tests.ranks import PRELOAD, like_torchrun, run_ranks

pytest.importorskip("transformers")

PRELOAD += ["shardckpt.integrations.transformers_trainer", "transformers.models.llama"]
JOB = Path(__file__).parent / "trainer_job.py"
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]


KINDS = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of 12 steps on 2 ranks, by kind."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {kind: job(JOB, folder / kind, 12, kind, ranks=2) for kind in KINDS}


@pytest.fixture
def stopped(tmp_path):
    """Saves eight steps on 2 ranks, and returns the folder."""

    def save(kind="ddp"):
        folder = tmp_path / "run"
        job(JOB, folder, 8, kind, ranks=2)
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["checkpoint-4", "checkpoint-8"]
        return folder

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_on_as_many_ranks_is_equal(stopped, uninterrupted, kind):
    folder = stopped(kind)
    resumed = job(JOB, folder, 12, kind, ranks=2)
    assert resumed == uninterrupted[kind]
    assert resumed["counts"] == [12]  # the state of a callback
    assert resumed["sharded"] == (kind == "fsdp2")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["checkpoint-12", "checkpoint-8"]  # save_total_limit


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_on_one_rank_is_equal_but_for_the_order_of_sums(stopped, uninterrupted, kind):
    resumed = job(JOB, stopped(kind), 12, kind, ranks=1)
    assert resumed["sum"] == pytest.approx(uninterrupted[kind]["sum"], rel=1e-4)
    assert resumed["steps"] == uninterrupted[kind]["steps"]


@pytest.mark.parametrize(
    ("kind", "best"),
    [
        ("ddp", 12),
        *(
            pytest.param(kind, best, marks=pytest.mark.long)
            for kind, best in [("ddp", 4), ("ddp", 8), ("fsdp2", 4), ("fsdp2", 12)]
        ),
    ],
)
def test_the_best_model_is_loaded_at_the_end(tmp_path, uninterrupted, kind, best):
    """Steps 4 and 8 are best before a restart and after it. Step 12 is also the last one."""
    run = tmp_path / "run"
    job(JOB, run, 8, kind, f"best-{best}", ranks=2)
    resumed = job(JOB, run, 12, kind, f"best-{best}", ranks=2)
    expected = {12: uninterrupted[kind]}.get(best) or job(JOB, tmp_path / "x", best, kind, ranks=2)
    assert resumed["digest"] == expected["digest"]
    assert {path.name for path in run.iterdir()} == {f"checkpoint-{best}", "checkpoint-12"} | (
        {"checkpoint-8"} if best == 12 else set()
    )


def test_a_checkpoint_holds_model_and_optimizer_once(stopped):
    folder = stopped()
    saved = shardckpt.metadata(folder / "checkpoint-8")
    assert saved.world_size == 2
    assert "model.lm_head.weight" in saved.tensors
    assert any(name.startswith("optimizer.state") for name in saved.tensors)
    assert {path.suffix for path in (folder / "checkpoint-8").iterdir()} == {
        ".json",
        ".safetensors",
    }


def test_a_checkpoint_that_the_trainer_did_not_complete_is_left_out(stopped, uninterrupted):
    folder = stopped()
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    assert job(JOB, folder, 12, ranks=2)["digest"] == uninterrupted["ddp"]["digest"]


def test_save_only_model_save_model_and_push_to_hub_write_folders_of_the_hub(tmp_path):
    transformers = pytest.importorskip("transformers")
    job(JOB, tmp_path / "run", 4, "only-model", "save-model", ranks=2)
    job(JOB, tmp_path / "pushed", 4, "push", ranks=2)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4", tmp_path / "pushed"):
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_peft_model_is_resumed_with_its_base(tmp_path):
    pytest.importorskip("peft")
    whole = job(JOB, tmp_path / "whole", 12, "lora", ranks=2)
    job(JOB, tmp_path / "run", 8, "lora", ranks=2)
    names = shardckpt.metadata(tmp_path / "run" / "checkpoint-8").tensors
    weights = [name for name in names if name.startswith("model.")]
    assert len([name for name in weights if "lora" in name]) == 4
    assert any("base_layer" in name for name in weights)
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    assert job(JOB, tmp_path / "run", 12, "lora", ranks=2)["digest"] == whole["digest"]
    one_rank = job(JOB, tmp_path / "one", 12, "lora", ranks=1)
    assert one_rank["sum"] == pytest.approx(whole["sum"], rel=1e-4)


def train_resnet(folder):
    """Save a checkpoint and a folder. Returns the mean of a batch norm of this rank."""
    import transformers

    from shardckpt.integrations.transformers_trainer import Trainer

    like_torchrun(2)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=2
    )
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": index % 2} for index in range(8)]
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, max_steps=1, save_steps=1, per_device_train_batch_size=4,
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(f"{folder}/final")
    return model.resnet.embedder.embedder.normalization.running_mean.tolist()


def test_the_buffers_of_rank_0_are_saved_under_ddp(tmp_path):
    """Batch norms have other buffers on each rank, until DDP replaces them in the next step."""
    transformers = pytest.importorskip("transformers")
    first, second = run_ranks(2, train_resnet, str(tmp_path / "run"))
    assert first != second
    name = "resnet.embedder.embedder.normalization.running_mean"
    saved = shardckpt.load_state(tmp_path / "run" / "checkpoint-1", keys=[f"model.{name}"])
    assert saved["model"][name].tolist() == first
    opened = transformers.AutoModel.from_pretrained(tmp_path / "run" / "final")
    assert opened.embedder.embedder.normalization.running_mean.tolist() == first
