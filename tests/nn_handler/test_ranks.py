"""NNHandler on several ranks: they save, stop and fail together; checkpoints fit any number."""

from __future__ import annotations

import datetime
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from shardckpt import NNHandler
from shardckpt.errors import RankFailedError
from shardckpt.nn_handler import Callback
from tests.nn_handler.models import Net, Noisy, NormNet, a_handler, data, same, weights, with_data
from tests.ranks import join_group, like_torchrun, on_world_sizes, run_ranks


class SignalOnOneRank(Callback):
    """One rank alone gets the signal."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_step_end(self, handler, loss):
        if (handler.step, handler.rank) == (self.step, self.rank):
            os.kill(os.getpid(), signal.SIGTERM)


def job(parallel: str, folder: str, *, stop_at: int = 0) -> NNHandler:
    handler = a_handler(parallel, dropout=0.2)
    handler.seed(handler.seed_value)  # each rank its own dropout
    handler.set_train_loader(Noisy(), batch_size=4, shuffle=True)
    handler.add_callback(SignalOnOneRank(stop_at, 1))
    handler.auto_save(interval=-1, save_path=folder, resume="auto")
    return handler


def run(handler: NNHandler) -> NNHandler:
    options = {"gradient_accumulation_steps": 2, "ema_decay": 0.9, "agree_every": 1}
    handler.train(2, progress_bar=False, **options)
    return handler


def stop_and_resume(folder: str, parallel: str) -> list[str]:
    never = run(job(parallel, f"{folder}/never"))
    with pytest.raises(SystemExit):
        run(job(parallel, f"{folder}/c", stop_at=2))
    dist.barrier()
    found = os.listdir(f"{folder}/c")
    resumed = run(job(parallel, f"{folder}/c"))
    assert same(weights(resumed), weights(never))
    assert resumed.history == never.history
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path, parallel):
    assert run_ranks(2, stop_and_resume, str(tmp_path), parallel, timeout_s=110) == [["step2"]] * 2


class FailsOnOneRank(Callback):
    def on_step_end(self, handler, loss):
        if (handler.step, handler.rank) == (2, 1):
            raise ValueError("planted")


def loss_that_fails_on_one_rank(outputs, targets):
    if len(targets) == 5:
        dist.group.WORLD.set_timeout(datetime.timedelta(seconds=4))
        if dist.get_rank() == 1:
            # it gives up long before the others' collective ends, on a slow machine too
            os.environ["SHARDCKPT_DEADLINE_S"] = str(0.6)
            raise ValueError("planted")
    return nn.functional.cross_entropy(outputs, targets)


def outcome(handler: NNHandler) -> tuple[str, object, bool]:
    """Return the error that ends training, its rank, and whether it says "not saved"."""
    try:
        handler.train(2, progress_bar=False, agree_every=1)
    except Exception as error:
        not_saved = "nothing was saved" in str(getattr(error, "__notes__", ""))
        return type(error).__name__, getattr(error, "rank", None), not_saved
    return "no error", None, False


def fails_in_a_callback(folder: str) -> tuple[str, object, bool]:
    handler = a_handler("ddp")
    handler.auto_save(interval=-1, save_path=folder)
    handler.add_callback(FailsOnOneRank())
    return outcome(handler)


@pytest.mark.ranks
def test_an_exception_on_one_rank_ends_all_with_a_checkpoint(tmp_path):
    found = run_ranks(2, fails_in_a_callback, str(tmp_path), timeout_s=100)
    assert found == [("RankFailedError", 1, False), ("ValueError", None, False)]
    assert os.listdir(tmp_path) == ["step2"]


def fails_within_a_step(parallel: str, folder: str | None) -> tuple[str, object, bool]:
    """The second batch fails on rank 1, after a forward that has changed running means; the rank
    lives on, so that the others' collective ends by the group's timeout alone."""
    torch.manual_seed(0)
    handler = NNHandler(NormNet, parallel=parallel)
    handler.set_optimizer(torch.optim.SGD, lr=0.1)
    handler.set_train_loader(data(39), batch_size=8)  # the second batch of each rank has 5
    handler.set_loss_fn(loss_that_fails_on_one_rank)
    if folder is not None:
        handler.auto_save(interval=-1, save_path=f"{folder}/{parallel}")
    return outcome(handler)


def fails_in_several_ways(folder: str) -> list[tuple[str, object, bool]]:
    rank, port = dist.get_rank(), int(os.environ["TEST_STORE_PORT"])
    found = []
    for number, job in enumerate((("ddp", folder), ("fsdp", folder), ("ddp", None))):
        dist.destroy_process_group()
        os.environ["SHARDCKPT_DEADLINE_S"] = str(30.0)
        join_group(rank, 3, port, name=f"group{number}")
        found.append(fails_within_a_step(*job))
    return found


@pytest.mark.ranks
def test_an_exception_within_a_step_of_one_rank_ends_all(tmp_path):
    """Others wait in a collective; under DDP the rank that fails can save alone."""
    first, failed, last = run_ranks(3, fails_in_several_ways, str(tmp_path), timeout_s=100)
    heard = [("RankFailedError", (1,), not_saved) for not_saved in (False, True, False)]
    assert failed == [("ValueError", None, not_saved) for not_saved in (False, True, False)]
    assert first == last == heard
    assert os.listdir(tmp_path / "ddp") == ["step1"]
    assert os.listdir(tmp_path / "fsdp") == []
    loaded = NNHandler.load(tmp_path / "ddp" / "step1")
    assert loaded.position.samples == 24
    assert loaded.module.body[1].num_batches_tracked == 1  # the failed forward left no trace


def first_call_is_load(folder: str) -> tuple[float, str]:
    rank = dist.get_rank()
    like_torchrun(2)
    handler = with_data(NNHandler.load(f"{folder}/c"))
    assert (handler.rank, handler.world_size, handler.parallel) == (rank, 2, "ddp")
    handler.train(1, progress_bar=False)
    assert handler.step == 3  # of 48 samples, 8 a step and rank
    means = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(means, handler.module.head.weight.mean().reshape(1))
    assert means[0] == means[1]
    found = ""
    if rank == 0:  # a save by one rank alone raises, and does not hang
        os.environ["SHARDCKPT_ARRIVAL_DEADLINE_S"] = str(2.0)
        for name in ("alone", "alone.pth"):
            with pytest.raises(RankFailedError) as caught:
                handler.save(f"{folder}/{name}")
            found += str(caught.value.rank)
    os.environ["SHARDCKPT_ARRIVAL_DEADLINE_S"] = str(60.0)
    return handler.history["loss"][-1], found


@pytest.mark.ranks
def test_load_as_the_first_call_and_a_save_by_one_rank_alone(tmp_path):
    a_handler().save(tmp_path / "c")
    first, second = run_ranks(2, first_call_is_load, str(tmp_path), timeout_s=100)
    assert first[0] == second[0]
    assert first[1] == "(1,)(1,)"
    assert os.listdir(tmp_path) == ["c"]


def amp_with_fsdp(folder: str) -> list[str]:
    kinds = []

    def loss(outputs, targets):
        kinds.append(str(outputs.dtype))
        return nn.functional.cross_entropy(outputs, targets)

    handler = a_handler("fsdp")
    options = {"use_amp": True, "ema_decay": 0.9, "gradient_accumulation_steps": 2}
    handler.train(1, gradient_clipping_norm=0.5, progress_bar=False, **options)
    handler.save(f"{folder}/c")
    resumed = with_data(NNHandler.load(f"{folder}/c", parallel="fsdp"))
    for each in (handler, resumed):
        each.set_loss_fn(loss)
        each.train(1, gradient_clipping_norm=0.5, progress_bar=False, **options)
    assert same(weights(resumed), weights(handler))
    assert resumed.history == handler.history
    return kinds


@pytest.mark.ranks
def test_bfloat16_with_fsdp_resumes_to_the_same_bits(tmp_path):
    found = run_ranks(2, amp_with_fsdp, str(tmp_path))
    assert set(found[0]) == set(found[1]) == {"torch.bfloat16"}


def mid_epoch(size: int, folder: str, parallel: str) -> None:
    """Stopped within an epoch on 4 ranks; the samples left are seen once on any number."""
    handler = a_handler(parallel)
    handler.set_train_loader(Noisy(), batch_size=2, shuffle=True)
    handler.set_val_loader(data(15), batch_size=4)
    if size == 4:
        handler.add_callback(SignalOnOneRank(4, 2))
        handler.auto_save(interval=-1, save_path=f"{folder}/c")
        with pytest.raises(SystemExit):
            handler.train(1, progress_bar=False, agree_every=1)
        expected = weights(handler)
        if dist.get_rank() == 0:
            torch.save([expected, handler.train_data.loader.dataset.seen], f"{folder}/expected.pt")
        return
    expected, _ = torch.load(f"{folder}/expected.pt", weights_only=True)
    for kind in ("ddp", "fsdp"):
        resumed = NNHandler.load(f"{folder}/c/step4", parallel=kind, skip_callbacks=True)
        assert same(weights(resumed), expected)
        assert resumed.position.samples == 32
        noisy = Noisy()
        resumed.set_train_loader(noisy, batch_size=2, shuffle=True)
        resumed.auto_save(interval=None)
        resumed.train(1, progress_bar=False)
        seen: list = [None] * size
        dist.all_gather_object(seen, noisy.seen)
        counts = torch.tensor([index for own in seen for index in own]).bincount(minlength=48)
        generator = torch.Generator().manual_seed(0)
        left = torch.randperm(48, generator=generator)[32:]
        assert counts[left].min() >= 1
        assert counts.sum() <= 16 + size - 1
        assert (counts > 0).sum() == 16


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_a_stop_on_4_ranks_resumes_on_2_and_3(tmp_path, parallel):
    run_ranks(4, on_world_sizes, (4, 2, 3), mid_epoch, str(tmp_path), parallel, timeout_s=110)


def tensor_parallel(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}

    def make() -> NNHandler:
        torch.manual_seed(0)
        handler = NNHandler(Net, device_mesh=mesh, tp_plan=plan)
        handler.set_optimizer(torch.optim.AdamW, lr=0.01)
        handler.set_loss_fn(nn.CrossEntropyLoss())
        return with_data(handler)

    handler = make()
    handler.train(1, gradient_clipping_norm=0.5, progress_bar=False)
    handler.save(f"{folder}/c")
    handler.save(f"{folder}/c.pth")
    expected = weights(handler)
    handler.train(1, gradient_clipping_norm=0.5, progress_bar=False)
    for name in ("c", "c.pth"):
        resumed = NNHandler.load(f"{folder}/{name}", device_mesh=mesh, tp_plan=plan)
        assert same(weights(resumed), expected)
        with_data(resumed).train(1, gradient_clipping_norm=0.5, progress_bar=False)
        assert same(weights(resumed), weights(handler))
    if dist.get_rank() == 0:
        torch.save(expected, f"{folder}/expected.pt")


@pytest.mark.ranks
def test_a_tensor_parallel_model_trains_and_resumes(tmp_path):
    run_ranks(4, tensor_parallel, str(tmp_path), timeout_s=110)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    assert same(weights(NNHandler.load(tmp_path / "c")), expected)


def different_metrics(folder: str) -> tuple[list[str], dict[str, list[float]]]:
    handler = a_handler("ddp")
    handler.auto_save(interval=1, save_path=folder, name="e{epoch}_{loss:.6f}", asynchronous=True)
    handler.train(2, progress_bar=False)
    # rank 0 may hold the lock of the last save, a hidden file, for a moment longer
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    return sorted(names), handler.history


@pytest.mark.ranks
def test_metrics_and_names_are_the_same_on_all_ranks(tmp_path):
    (names, history), other = run_ranks(2, different_metrics, str(tmp_path))
    assert (names, history) == other
    assert len(names) == 2
