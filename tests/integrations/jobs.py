"""Runs scripts on ranks, with the environment that torchrun gives them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from typing import Any

from tests.ranks import Ranks, like_torchrun, run_ranks, start_ranks


def job(script: Any, *arguments: Any, ranks: int) -> Any:
    """Run a script in new processes. Returns the JSON in the last line that rank 0 prints."""
    printed = run_ranks(ranks, _run, str(script), [str(one) for one in arguments], ranks)[0]
    return json.loads(printed.splitlines()[-1])


def start_job(script: Any, *arguments: Any, ranks: int) -> Ranks:
    """As job, without waiting. The result of a rank is all that it prints."""
    return start_ranks(ranks, _run, str(script), [str(one) for one in arguments], ranks)


def _run(path: str, arguments: list[str], ranks: int) -> str:
    like_torchrun(ranks)
    os.environ.update(
        TORCHELASTIC_RUN_ID="test", GROUP_RANK="0", LOCAL_WORLD_SIZE=str(ranks), HF_HUB_OFFLINE="1"
    )
    sys.argv = [path, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(path, run_name="__main__")
    return out.getvalue()


def allow_fsdp_on_cpu():
    """Shard CPU ranks too, by the same code: accelerate takes the plugin only on devices."""
    from accelerate import state

    initialize = state.AcceleratorState.__init__

    def with_plugin(self, *arguments, fsdp_plugin=None, **named):
        initialize(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = with_plugin
