"""Lightning's Trainer: saved on 2 ranks, resumed in new processes on 2 and 1."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardckpt
from tests.integrations.jobs import job
from tests.ranks import PRELOAD

pytest.importorskip("lightning")

PRELOAD += ["shardckpt.integrations.lightning", "lightning.pytorch"]
JOB = Path(__file__).parent / "lightning_job.py"
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]
KINDS = ["ddp", "model_parallel", "callback"]  # torch refuses FSDP1 on CPU ranks


def resume_from(kind: str) -> str:
    return "-" if kind == "callback" else "last"  # the callback finds its checkpoint by itself


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of four epochs on 2 ranks, by strategy."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {kind: job(JOB, kind, folder / kind, 4, "-", ranks=2) for kind in KINDS}


@pytest.mark.parametrize("options", [(), ("asynchronous",)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_on_as_many_ranks_is_equal(tmp_path, uninterrupted, kind, options):
    folder = tmp_path / "run"
    first = job(JOB, kind, folder, 2, "-", *options, ranks=2)
    assert first["losses"] == uninterrupted[kind]["losses"][:2]
    second = job(JOB, kind, folder, 4, resume_from(kind), *options, ranks=2)
    assert second["losses"] == uninterrupted[kind]["losses"][2:]
    assert second["digest"] == uninterrupted[kind]["digest"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_on_one_rank_is_equal_but_for_the_order_of_sums(
    tmp_path, uninterrupted, kind
):
    folder = tmp_path / "run"
    job(JOB, kind, folder, 2, "-", ranks=2)
    second = job(JOB, kind, folder, 4, resume_from(kind), ranks=1)
    assert second["losses"] == pytest.approx(uninterrupted[kind]["losses"][2:], rel=1e-3)
    assert second["sum"] == pytest.approx(uninterrupted[kind]["sum"], rel=1e-3)


@pytest.mark.parametrize("options", [(), ("asynchronous",)])
def test_model_checkpoint_keeps_what_it_says(tmp_path, options):
    job(JOB, "ddp", tmp_path / "run", 4, "-", "keep", *options, ranks=2)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["epoch=3.ckpt", "last.ckpt"]
    assert shardckpt.metadata(tmp_path / "run" / "last.ckpt").world_size == 2
    shardckpt.verify(tmp_path / "run" / "epoch=3.ckpt")


def test_a_checkpoint_of_lightning_itself_is_resumed_and_the_next_one_is_ours(
    tmp_path, uninterrupted
):
    folder = tmp_path / "run"
    job(JOB, "lightning", folder, 2, "-", ranks=2)
    assert (folder / "last.ckpt").is_file()
    second = job(JOB, "ddp", tmp_path / "new", 4, folder / "last.ckpt", ranks=2)
    assert second["digest"] == uninterrupted["ddp"]["digest"]
    assert shardckpt.metadata(tmp_path / "new" / "last.ckpt").world_size == 2


def test_the_weights_are_loaded_without_lightning(tmp_path):
    job(JOB, "model_parallel", tmp_path / "run", 2, "-", ranks=2)
    state = shardckpt.load_state(tmp_path / "run" / "last.ckpt")
    assert state["state_dict"]["layers.0.weight"].shape == (16, 8)
    assert state["lightning"]["epoch"] == 1


def test_a_converted_checkpoint_is_resumed_by_lightning_itself(tmp_path, uninterrupted):
    job(JOB, "ddp", tmp_path / "run", 2, "-", ranks=2)
    shardckpt.convert(tmp_path / "run" / "last.ckpt", tmp_path / "file.ckpt", to="lightning")
    second = job(JOB, "lightning", tmp_path / "new", 4, tmp_path / "file.ckpt", ranks=2)
    assert second["digest"] == uninterrupted["ddp"]["digest"]
