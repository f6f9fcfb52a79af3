"""The Trainer: saved on 2 ranks, and resumed in new processes on 2 and on 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import shardckpt
from tests.integrations.jobs import job
from tests.ranks import PRELOAD

pytest.importorskip("transformers")

PRELOAD += ["shardckpt.integrations.transformers_trainer", "transformers.models.llama"]
JOB = Path(__file__).parent / "trainer_job.py"
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return job(JOB, tmp_path_factory.mktemp("uninterrupted"), 12, ranks=2)


@pytest.fixture
def stopped(tmp_path):
    """A folder with the checkpoints of the first eight steps, on 2 ranks."""
    job(JOB, tmp_path / "run", 8, ranks=2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-4",
        "checkpoint-8",
    ]
    return tmp_path / "run"


def test_a_run_resumed_on_as_many_ranks_is_equal(stopped, uninterrupted):
    resumed = job(JOB, stopped, 12, ranks=2)
    assert resumed["digest"] == uninterrupted["digest"]
    assert resumed["steps"] == uninterrupted["steps"]
    names = sorted(path.name for path in stopped.iterdir())
    assert names == ["checkpoint-12", "checkpoint-8"]  # save_total_limit


def test_a_run_resumed_on_one_rank_is_equal_but_for_the_order_of_sums(stopped, uninterrupted):
    resumed = job(JOB, stopped, 12, ranks=1)
    assert resumed["sum"] == pytest.approx(uninterrupted["sum"], rel=1e-4)
    assert resumed["steps"] == uninterrupted["steps"]


def test_a_checkpoint_holds_model_and_optimizer_once(stopped):
    saved = shardckpt.metadata(stopped / "checkpoint-8")
    assert saved.world_size == 2
    assert "model.lm_head.weight" in saved.tensors
    assert any(name.startswith("optimizer.state") for name in saved.tensors)
    assert {path.suffix for path in (stopped / "checkpoint-8").iterdir()} == {
        ".json",
        ".safetensors",
    }


def test_a_checkpoint_that_the_trainer_did_not_complete_is_left_out(stopped, uninterrupted):
    (stopped / "checkpoint-8" / "trainer_state.json").unlink()
    assert job(JOB, stopped, 12, ranks=2)["digest"] == uninterrupted["digest"]


def test_save_only_model_and_save_model_write_folders_of_the_hub(tmp_path):
    transformers = pytest.importorskip("transformers")
    job(JOB, tmp_path / "run", 4, "only-model", "save-model", ranks=2)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
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
    assert job(JOB, tmp_path / "run", 12, "lora", ranks=2)["digest"] == whole["digest"]
