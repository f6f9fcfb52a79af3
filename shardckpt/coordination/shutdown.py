"""Destroy process groups at exit, so that the threads of gloo do not abort the process."""

from __future__ import annotations

import atexit
import time

import torch.distributed as dist

__all__ = ["destroy_groups", "destroy_groups_at_exit"]

_GLOO_S = 0.1


def destroy_groups() -> None:
    """Destroy the default group, if there is one. Collective for nccl, not for gloo."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    # After a collective the threads of gloo release their tensors, for which they need the
    # interpreter lock. A thread that waits for the lock when the interpreter ends aborts the
    # process (torch 2.13). So this thread leaves the lock to them for a moment.
    time.sleep(_GLOO_S)


def destroy_groups_at_exit() -> None:
    """Call `destroy_groups` when the interpreter ends. Registered once."""
    atexit.unregister(destroy_groups)
    atexit.register(destroy_groups)
