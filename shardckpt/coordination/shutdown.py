"""How a process leaves torch.distributed's groups, so that gloo's threads can't abort its exit."""

from __future__ import annotations

import atexit
import time

import torch.distributed as dist

__all__ = ["leave", "leave_at_exit"]

_GLOO_S = 0.1


def leave() -> None:
    """Destroy the default group, if there is one. Collective where it is nccl's, else not."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    # gloo's threads drop their last tensors after the collective that the main thread has waited
    # for, and need the interpreter lock for it; one that still waits for the lock when the
    # interpreter ends aborts the process (torch 2.13). So the lock is left to them for a moment.
    time.sleep(_GLOO_S)


def leave_at_exit() -> None:
    """Do that when the interpreter ends; said twice, it is done once."""
    atexit.unregister(leave)
    atexit.register(leave)
