"""When training fails, find out which ranks failed, and where."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardckpt.config import current
from shardckpt.errors import RankFailedError
from shardckpt.torch_compat import change_count, group_store

__all__ = ["BufferCopies", "Failure", "group_of_one", "is_echo", "meet"]

_meetings = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The result of a meeting of ranks when training fails.

    Attributes:
        together: All ranks stopped at the same point.
        culprits: The ranks that failed by themselves, or did not answer.
        problem: The reason why the ranks are not together.
        elected: This rank may save for all, if the ranks are not together.
    """

    together: bool = True
    culprits: tuple[int, ...] = ()
    problem: str = ""
    elected: bool = False

    def error(self) -> RankFailedError:
        """The error to raise on the other ranks."""
        return RankFailedError(
            "Training fails on another rank",
            rank=self.culprits,
            actual=self.problem or None,
            remedy="look at that rank's own error",
        )


def is_echo(error: BaseException) -> bool:
    """Whether an error says that a collective broke, because another rank failed."""
    by_gloo = any(text in str(error) for text in ("gloo/", "Application timeout caused"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and by_gloo)


def meet(where: str, *, echo: bool, patient: bool) -> Failure:
    """Tell the other ranks that this one failed at a point, and learn what happened to them.

    The ranks use the store of the process group. A rank that fails alone, within a step, leaves the
    others in a collective. Only the end of its process or the timeout of the group ends that: with
    gloo in torch 2.13, neither abort nor shutdown does. So a `patient` rank waits for a while for
    others that fail too, and then writes that it has given up. The others read this when their
    collective breaks. `echo`: the error of this rank is such a break.

    Raises RankFailedError if the store does not answer.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Failure()
    try:
        return _meet(where, echo=echo, patient=patient)
    except (RuntimeError, dist.DistError) as error:
        raise RankFailedError(
            "Training fails, and the other ranks can no longer be reached",
            actual=str(error).splitlines()[0],
            remedy="look at the output of rank 0 and of the launcher: one of them held the store",
        ) from error


def _meet(where: str, *, echo: bool, patient: bool) -> Failure:
    group = dist.group.WORLD
    assert group is not None
    store, own = group_store(group), dist.get_rank()
    begin = f"shardckpt/emergency/{next(_meetings)}"
    keys = {rank: f"{begin}/{rank}" for rank in range(dist.get_world_size())}
    store.set(keys[own], f"{where}\n{'echo' if echo else ''}")
    give_up_at = time.monotonic() + (current().deadline_s / 3 if patient or echo else 0.0)
    while not (here := store.check(list(keys.values()))):
        if store.check([f"{begin}/verdict"]) or time.monotonic() > give_up_at:
            break
        time.sleep(0.05)
    # The first rank decides for all. Otherwise one could give up while the last one arrives.
    verdict = store.compare_set(f"{begin}/verdict", "", "met" if here else "given up").decode()
    told = {r: store.get(key).decode().split("\n") for r, key in keys.items() if store.check([key])}
    missing = tuple(rank for rank in keys if rank not in told)
    culprits = tuple(rank for rank, (_, heard) in told.items() if not heard) or missing
    places = sorted({place for place, _ in told.values()})
    if verdict == "met" and len(places) == 1:
        return Failure(culprits=culprits)
    if verdict == "met":
        return Failure(together=False, culprits=culprits, problem=f"the ranks stopped at {places}")
    problem = f"ranks {list(missing)} have not failed at the same step"
    chosen = store.compare_set(f"{begin}/elected", "", str(own)).decode()
    return Failure(
        together=False,
        culprits=culprits,
        problem=problem if missing else "a rank has given up waiting for the others",
        elected=chosen == str(own),
    )


def group_of_one() -> Any:
    """A process group of only this rank, for a save without the others. Not collective."""
    return dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


class BufferCopies:
    """Copies of the buffers of a model at a boundary.

    A forward pass that fails may have changed some, such as running means. The buffers of a module
    are copied when one of them has changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [m for m in model.modules() if list(m.buffers(recurse=False))]
        self.copies: dict[int, dict[str, torch.Tensor]] = {}
        self.versions: dict[int, list[tuple[int, int]]] = {}

    def note(self) -> None:
        """Copy the buffers that have changed. Called at a boundary."""
        for number, module in enumerate(self.modules):
            # the counter `num_batches_tracked` of a BatchNorm shows that its means have changed
            versions = [(id(b), change_count(b)) for b in module.buffers(recurse=False)]
            if self.versions.get(number) != versions:
                self.versions[number] = versions
                named = module.named_buffers(recurse=False)
                self.copies[number] = {n: b.detach().clone() for n, b in named}

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the buffers of the last boundary."""
        for number, copies in self.copies.items():
            for name, copy in copies.items():
                buffer = getattr(self.modules[number], name)
                if buffer.shape == copy.shape:
                    buffer.copy_(copy)
