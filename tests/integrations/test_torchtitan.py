"""torchtitan's checkpoint manager: saved on 2 ranks, resumed in new processes on 2 and 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardckpt
from tests.integrations.jobs import job
from tests.ranks import PRELOAD, RankError

pytest.importorskip("torchtitan")

PRELOAD += ["shardckpt.integrations.torchtitan"]
JOB = Path(__file__).parent / "torchtitan_job.py"
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return job(JOB, tmp_path_factory.mktemp("uninterrupted"), 12, "full", ranks=2)


@pytest.mark.parametrize("options", [(), ("asynchronous",)])
def test_a_run_resumed_on_as_many_ranks_is_equal(tmp_path, uninterrupted, options):
    first = job(JOB, tmp_path, 7, *options, ranks=2)
    assert (first["loaded"], first["steps"]) == (False, ["step-3", "step-6"])
    second = job(JOB, tmp_path, 12, "full", *options, ranks=2)
    assert (second["loaded"], second["first"]) == (True, 6)
    assert second["digest"] == uninterrupted["digest"]
    assert second["steps"] == uninterrupted["steps"] == ["step-12", "step-9"]  # keep_latest_k


def test_another_number_of_ranks_needs_the_data_anew(tmp_path, uninterrupted):
    job(JOB, tmp_path, 7, ranks=2)
    with pytest.raises(RankError, match="does not fit another data-parallel degree"):
        job(JOB, tmp_path, 12, ranks=1)
    second = job(JOB, tmp_path, 12, "full", "anew", ranks=1)
    assert second["first"] == 6
    assert second["sum"] == pytest.approx(uninterrupted["sum"], rel=1e-4)


def test_the_last_save_has_only_the_model_in_the_export_dtype(tmp_path):
    job(JOB, tmp_path, 12, "bfloat16", ranks=2)
    saved = shardckpt.load_state(tmp_path / "checkpoint" / "step-12")
    assert "optimizer" not in saved
    assert {value.dtype for value in saved["model"].values()} == {torch.bfloat16}
    initial = job(JOB, tmp_path / "new", 1, tmp_path / "checkpoint" / "step-9", ranks=1)
    assert initial["loaded"]
    assert initial["first"] == 0


def test_the_last_save_and_the_first_load_take_the_layout_of_hugging_face(tmp_path):
    last = job(JOB, tmp_path, 12, "hf", ranks=2)
    saved = load_file(tmp_path / "checkpoint" / "step-12" / "model.safetensors")
    assert sorted(saved) == ["model.0.bias", "model.0.weight", "model.2.bias", "model.2.weight"]
    total = sum(value.double().sum().item() for value in saved.values())
    assert total == pytest.approx(last["sum"])
    folder = tmp_path / "checkpoint" / "step-12"
    initial = job(JOB, tmp_path / "new", 1, folder, "from-hf", ranks=2)
    assert initial["start"] == pytest.approx(saved["model.0.weight"].sum().item(), rel=1e-5)
