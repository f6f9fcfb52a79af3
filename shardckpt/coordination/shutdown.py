"""Destroy process groups at exit, so that the threads of gloo do not abort the process."""

from __future__ import annotations

import atexit
import time

import torch.distributed as dist

__all__ = ["destroy_groups", "destroy_groups_at_exit"]

_GLOO_S = 0.1


def destroy_groups() -> None:
    """Destroy the default group, if there is one. Collective for nccl, not for gloo."""
    # After a collective the threads of gloo release their tensors, for which they need the
    # interpreter lock. Before torch 2.8, to destroy the group then is a deadlock. In torch 2.13, a
    # thread that waits for the lock when the interpreter ends aborts the process. So this thread
    # leaves the lock to them for a moment.
    time.sleep(_GLOO_S)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def destroy_groups_at_exit() -> None:
    """Call `destroy_groups` when the interpreter ends. Registered once."""
    atexit.unregister(destroy_groups)
    atexit.register(destroy_groups)
