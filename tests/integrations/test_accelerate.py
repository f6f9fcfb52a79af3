"""An Accelerator: saved on 2 ranks, resumed in new processes on 2 and 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.errors import CheckpointNotFoundError, StateError
from tests.integrations.jobs import job
from tests.ranks import PRELOAD, like_torchrun, run_ranks

accelerate = pytest.importorskip("accelerate")

from shardckpt.integrations.accelerate import save_state, use_shardckpt  # noqa: E402

PRELOAD += ["shardckpt.integrations.accelerate", "accelerate"]
JOB = Path(__file__).parent / "accelerate_job.py"
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]


KINDS = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The results of 12 steps on 2 ranks, by kind."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {kind: job(JOB, folder / kind, 12, kind, ranks=2) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [5, 8])  # within the first epoch, and at its end
def test_a_run_resumed_on_as_many_ranks_is_equal(tmp_path, uninterrupted, kind, step):
    first = job(JOB, tmp_path, step, kind, ranks=2)
    assert first["sharded"] == (kind == "fsdp2")
    assert shardckpt.metadata(tmp_path / "checkpoint").world_size == 2
    assert job(JOB, tmp_path, 12, kind, ranks=2) == uninterrupted[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_on_one_rank_is_equal_but_for_the_order_of_sums(
    tmp_path, uninterrupted, kind
):
    job(JOB, tmp_path, 5, kind, ranks=2)
    resumed = job(JOB, tmp_path, 12, kind, ranks=1)
    assert resumed["sum"] == pytest.approx(uninterrupted[kind]["sum"], rel=1e-4)
    assert resumed["steps"] == 12


def test_automatic_names_and_their_limit(tmp_path):
    job(JOB, tmp_path, 4, "automatic", ranks=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint_2", "checkpoint_3"]


def test_a_missing_path_is_refused(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, project_dir=str(tmp_path))
    use_shardckpt(accelerator)
    with pytest.raises(StateError, match="No path for the checkpoint"):
        accelerator.save_state()
    with pytest.raises(CheckpointNotFoundError, match="automatic name"):
        accelerator.load_state()
    with pytest.raises(CheckpointNotFoundError):
        accelerator.load_state(str(tmp_path / "nothing"))
    save_state(accelerator, tmp_path / "empty")
    accelerator.load_state(tmp_path / "empty")


def test_arguments_of_save_and_load_are_taken_and_others_refused(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    use_shardckpt(accelerator)
    accelerator.prepare(torch.nn.Linear(2, 2, bias=False))
    path = accelerator.save_state(str(tmp_path / "checkpoint"), check_replicas=True)
    with pytest.raises(shardckpt.errors.CheckpointExistsError):
        accelerator.save_state(path, overwrite=False)
    larger = accelerate.Accelerator(cpu=True)
    larger.free_memory()
    use_shardckpt(larger)
    larger.prepare(torch.nn.Linear(2, 2))
    with pytest.raises(shardckpt.errors.LoadMismatchError, match="strict=False"):
        larger.load_state(path, map_location="cpu")
    assert larger.load_state(path, strict=False).missing == ("models.0.bias",)
    for options in ({"load_kwargs": {"weights_only": True}}, {"map_location": "meta"}):
        with pytest.raises(StateError, match=next(iter(options))):
            larger.load_state(path, **options)
    for options in ({"safe_serialization": False}, {"tag": "x"}, {"storage": None}):
        with pytest.raises(StateError, match=next(iter(options))):
            larger.save_state(path, **options)


def test_hooks_may_take_models_and_weights_out_of_their_lists(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    use_shardckpt(accelerator)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    found = []

    def save(models, weights, path):
        found.append(torch.equal(weights.pop()["weight"], models.pop().weight))

    def load(models, path):
        models.pop()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    accelerator.save_state(str(tmp_path / "checkpoint"))
    expected = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert torch.equal(model.weight, expected)
    assert accelerator._models == [model]
    assert found == [True]


def test_a_resumed_run_continues_the_automatic_numbers(tmp_path):
    def started():
        configuration = accelerate.utils.ProjectConfiguration(
            str(tmp_path), automatic_checkpoint_naming=True, total_limit=2
        )
        accelerator = accelerate.Accelerator(cpu=True, project_config=configuration)
        use_shardckpt(accelerator)
        return accelerator

    first = started()
    for _ in range(3):
        first.save_state()
    resumed = started()
    resumed.load_state()
    resumed.save_state()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint_2", "checkpoint_3"]


def save_batch_norm(folder):
    """Return the mean of a batch norm of this rank before a save and after a load."""
    rank = dist.get_rank()
    like_torchrun(2)
    accelerator = accelerate.Accelerator(cpu=True)
    use_shardckpt(accelerator)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(wrapped(torch.randn(4, 2) + rank).square().sum())
    optimizer.step()
    accelerator.save_state(folder)
    mean = model[1].running_mean.tolist()
    accelerator.load_state(folder)
    return mean, model[1].running_mean.tolist()


def test_the_buffers_of_rank_0_are_saved_under_ddp(tmp_path):
    """Batch norms have other buffers on each rank, until DDP replaces them in the next step."""
    (first, first_loaded), (second, second_loaded) = run_ranks(
        2, save_batch_norm, str(tmp_path / "checkpoint")
    )
    assert first != second
    assert first == first_loaded == second_loaded
