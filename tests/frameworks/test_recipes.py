"""Every recipe in every layout, killed and stopped at random steps, resumed there and elsewhere."""

from __future__ import annotations

import math
import random
import signal

import pytest

from tests.nn_handler.recipes import EPOCHS, RECIPES, kill, run
from tests.ranks import PRELOAD

LAYOUTS = {"python": ("none", 1), "ddp": ("ddp", 2), "fsdp": ("fsdp", 2)}


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.timeout(1200)  # eleven jobs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_survives_kills_and_signals(tmp_path, recipe, layout):
    if recipe == "llama":
        pytest.importorskip("transformers")
        PRELOAD.append("transformers.models.llama.modeling_llama")  # takes seconds for each rank
    parallel, ranks = LAYOUTS[layout]
    never = run(recipe, parallel, tmp_path / "never", ranks)
    for by in (signal.SIGKILL, signal.SIGTERM):
        folder = tmp_path / by.name
        for start in (2, 5):
            at_step = random.randint(start, start + 2)
            kill(recipe, parallel, folder, ranks, by=by, at_step=at_step)
        assert run(recipe, parallel, folder, ranks) == never, by.name
        # the same job, continued in every other layout
        for other, (other_parallel, other_ranks) in LAYOUTS.items():
            if other != layout:
                folder = tmp_path / f"{by.name}-{other}"
                kill(recipe, parallel, folder, ranks, by=by, at_step=random.randint(3, 6))
                found = run(recipe, other_parallel, folder, other_ranks)
                assert found["epoch"] == EPOCHS
                assert all(math.isfinite(loss) for loss in found["history"]["loss"])
