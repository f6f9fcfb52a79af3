"""The recipes, each stopped by SIGTERM in the middle of an epoch and resumed on two ranks."""

from __future__ import annotations

import math
import signal

import pytest

from tests.nn_handler.recipes import EPOCHS, kill, run


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("recipe", "parallel"),
    [
        pytest.param("conv", "ddp", marks=pytest.mark.long),
        ("ranker", "fsdp"),
        pytest.param("gan", "fsdp", marks=pytest.mark.long),
        pytest.param("llama", "ddp", marks=pytest.mark.long),
    ],
)
def test_a_recipe_that_is_stopped_resumes_to_the_same_bits(tmp_path, recipe, parallel):
    if recipe == "llama":
        pytest.importorskip("transformers")
    never = run(recipe, parallel, tmp_path / "never", 2)
    kill(recipe, parallel, tmp_path / "c", 2, by=signal.SIGTERM, at_step=3)
    assert run(recipe, parallel, tmp_path / "c", 2) == never
    assert never["epoch"] == EPOCHS
    assert all(math.isfinite(loss) for loss in never["history"]["loss"])
