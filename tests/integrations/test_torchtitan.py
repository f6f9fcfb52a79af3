"""torchtitan's checkpoint manager: saved on 2 ranks, resumed in new processes on 2 and 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import shardckpt
from shardckpt.errors import LoadMismatchError, StateError
from tests.integrations.jobs import job
from tests.ranks import PRELOAD, RankError

pytest.importorskip("torchtitan")

from torchtitan.components.dataloader import ParallelAwareDataloader

from shardckpt.integrations.torchtitan import ShardckptManager

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


class Part:
    """An optimizer, a scheduler or another part of a trainer, with one value as its state."""

    value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Names:
    """An adapter with the names of Hugging Face."""

    hf_assets_path = None

    def to_hf(self, state):
        return {f"model.{name}": value for name, value in state.items()}


def built(base, *, loader=None, adapter=None, **options):
    """A manager of one process, whose model has the weights 1."""
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.ones_(model.weight)
    options = {"interval": 3, "last_save_model_only": False, **options}
    config = ShardckptManager.Config(enable=True, **options)
    return config.build(
        dataloader=loader, model_parts=[model], optimizers=Part(), lr_schedulers=Part(),
        states={"train_state": Part()}, sd_adapter=adapter, base_folder=str(base),
    )  # fmt: skip


def weight(manager):
    return manager.model.model[0].weight.detach()


def test_a_run_from_an_older_step_replaces_the_checkpoints_that_follow_it(tmp_path):
    manager = built(tmp_path)
    manager.save(3)
    manager.save(6)
    manager = built(tmp_path)
    assert manager.load(step=3)
    weight(manager).fill_(2)
    manager.save(6)
    saved = shardckpt.load_state(tmp_path / "checkpoint" / "step-6")
    assert saved["model"]["weight"].tolist() == [[2, 2], [2, 2]]


def test_the_last_step_in_the_layout_of_hugging_face_can_be_saved_again(tmp_path):
    for _ in range(2):
        manager = built(tmp_path, adapter=Names(), last_save_model_only=True, last_save_in_hf=True)
        assert manager.save(7, last_step=True)
    assert (tmp_path / "checkpoint" / "step-7" / "model.safetensors").is_file()


def test_a_longer_run_that_reaches_a_final_step_of_hugging_face_again_keeps_it(tmp_path):
    final = {"adapter": Names(), "last_save_model_only": True, "last_save_in_hf": True}
    built(tmp_path, **final).save(3, last_step=True)
    for _ in range(2):
        assert built(tmp_path, **final).save(3)
    shardckpt.verify(tmp_path / "checkpoint" / "step-3")
    assert (tmp_path / "checkpoint" / "step-3-hf" / "model.safetensors").is_file()


def test_a_name_in_exclude_from_loading_that_no_state_has_is_refused(tmp_path):
    built(tmp_path).save(3)
    with pytest.raises(StateError, match="exclude_from_loading") as refused:
        built(tmp_path, exclude_from_loading=["data_loader"]).load()
    assert "dataloader" in refused.value.expected


def test_a_folder_of_an_object_store_is_not_below_the_base_folder(tmp_path):
    assert built(tmp_path, folder="memory://bucket/run").folder == "memory://bucket/run"
    assert not any(tmp_path.iterdir())


def test_maybe_wait_for_saving_waits(tmp_path):
    manager = built(tmp_path, asynchronous=True)
    manager.save(3)
    manager.maybe_wait_for_saving()
    assert (tmp_path / "checkpoint" / "step-3" / "manifest.json").is_file()
    assert manager.save_future is None


def test_an_initial_checkpoint_may_have_another_dtype(tmp_path):
    options = {"last_save_model_only": True, "export_dtype": "bfloat16"}
    built(tmp_path, **options).save(3, last_step=True)
    manager = built(tmp_path / "new", initial_load_path=str(tmp_path / "checkpoint" / "step-3"))
    weight(manager).zero_()
    assert manager.load()
    assert weight(manager).tolist() == [[1, 1], [1, 1]]


def test_the_model_of_a_checkpoint_of_torchtitan_itself_is_loaded(tmp_path):
    path = tmp_path / "checkpoint" / "step-3"
    dcp.save({"weight": torch.full((2, 2), 3.0), "step": 3}, checkpoint_id=path, no_dist=True)
    manager = built(tmp_path / "new", initial_load_path=str(path))
    assert manager.load()
    assert weight(manager).tolist() == [[3, 3], [3, 3]]
    with pytest.raises(StateError, match="Only the model"):
        built(tmp_path / "new", initial_load_path=str(path), initial_load_model_only=False).load()
    for options in ({}, {"initial_load_path": str(path)}):  # the run would save to the same paths
        with pytest.raises(StateError, match="torchtitan's own manager"):
            built(tmp_path, **options).load()


def test_the_remedy_of_a_mismatch_names_options_of_torchtitan(tmp_path):
    built(tmp_path).save(3)
    dcp.save({"other": torch.ones(1)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    larger = built(tmp_path)
    larger.states["model"] = torch.nn.Linear(2, 2)
    initial = built(tmp_path / "new", initial_load_path=str(tmp_path / "dcp"))
    for manager, option in ((larger, "exclude_from_loading"), (initial, "initial_load_path")):
        with pytest.raises(LoadMismatchError) as refused:
            manager.load()
        assert option in refused.value.remedy
        assert "rename" not in refused.value.remedy


def test_a_missing_path_of_hugging_face_is_named(tmp_path):
    for adapter in (None, Names()):
        with pytest.raises(StateError, match="checkpoint of Hugging Face is not set"):
            built(tmp_path, adapter=adapter, initial_load_in_hf=True).load()


class Loader(ParallelAwareDataloader):
    """A loader with a state of its own."""

    extra = 0

    def state_dict(self):
        return {**super().state_dict(), "extra": self.extra}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.extra = state["extra"]


def test_a_loader_that_defines_its_own_state_keeps_it(tmp_path):
    def loader():
        return Loader([1, 2], dp_rank=0, dp_world_size=1, batch_size=None)

    first, second = loader(), loader()
    first.extra = 5
    built(tmp_path, loader=first).save(3)
    assert built(tmp_path, loader=second).load()
    assert second.extra == 5


def test_a_manager_closed_after_an_error_does_not_wait_for_other_ranks(tmp_path, monkeypatch):
    manager = built(tmp_path, asynchronous=True, keep_latest_k=2)
    manager.save(3)
    monkeypatch.setattr(shardckpt.CheckpointManager, "_prune", None)  # a collective call
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:  # as torchtitan's train.py
        manager.close()
    shardckpt.verify(tmp_path / "checkpoint" / "step-3")
