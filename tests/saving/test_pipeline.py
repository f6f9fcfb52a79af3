"""The stages of a save, in order."""

from __future__ import annotations

import contextlib

import pytest
import torch

import shardckpt
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.saving import pipeline
from shardckpt.saving.agreement import SaveTarget
from shardckpt.saving.pipeline import plan_state, run_save
from shardckpt.storage.local import LocalStorage

STATE = {"w": torch.arange(6.0), "step": 3}


def save(path, plan=None, **options):
    alone = SingleCoordinator()
    return run_save(
        plan or (lambda: plan_state(STATE, alone)),
        SaveTarget(str(path), LocalStorage(), overwrite=False),
        coordinator=alone,
        base=contextlib.nullcontext(None),
        check_replicas=False,
        **options,
    )


def test_the_plan_has_the_tensors_and_the_values_of_the_state():
    plan = plan_state(STATE, SingleCoordinator())
    assert [(spec.name, spec.dtype, spec.shape) for spec in plan.common] == [("w", "F32", (6,))]
    assert b'"step":3' in plan.tree
    assert plan.data[0].data_ptr() == STATE["w"].data_ptr()


@pytest.mark.parametrize("staged", [False, True])
def test_the_report_describes_the_checkpoint_at_the_path(tmp_path, staged):
    report = save(tmp_path / "c", staged=staged)
    assert shardckpt.load_state(tmp_path / "c")["w"].tolist() == STATE["w"].tolist()
    with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
        metadata = checkpoint.metadata()
    assert report.path == str(tmp_path / "c")
    assert report.checkpoint_id == metadata.checkpoint_id
    assert report.total_bytes == metadata.total_bytes
    assert set(report.seconds) == {"plan", "write"}
    assert {"plan", "write", "sync", "compare"} <= set(report.profile[0])


def test_each_stage_gets_the_result_of_the_stage_before_it(tmp_path, monkeypatch):
    calls = []
    for name in ("agree", "write_agreed", "commit"):
        stage = getattr(pipeline, name)

        def noted(*arguments, name=name, stage=stage, **options):
            calls.append((name, arguments))
            return stage(*arguments, **options)

        monkeypatch.setattr(pipeline, name, noted)
    save(tmp_path / "c")
    assert [name for name, _ in calls] == ["agree", "write_agreed", "commit"]
    agreement = calls[1][1][0]
    assert agreement.local is calls[0][1][1].get()
    assert calls[2][1][2] is agreement


def test_the_error_of_the_plan_is_raised_and_nothing_is_written(tmp_path):
    with pytest.raises(ZeroDivisionError):
        save(tmp_path / "c", lambda: 1 // 0)
    assert list(tmp_path.iterdir()) == []
