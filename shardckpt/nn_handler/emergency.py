"""Find out which ranks failed when training ends in an error, and at which point."""

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

__all__ = ["BufferCopies", "Failure", "group_of_one", "is_consequence", "meet"]

_meetings = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The result of a meeting of ranks when training fails.

    Attributes:
        at_one_point: All ranks stopped at the same point.
        failed_ranks: The ranks that failed by themselves, or did not answer.
        problem: The reason why they are not at the same point.
        may_save: This rank may save for all, if they are not at the same point.
    """

    at_one_point: bool = True
    failed_ranks: tuple[int, ...] = ()
    problem: str = ""
    may_save: bool = False

    def error(self) -> RankFailedError:
        """Return the error to raise on the other ranks."""
        return RankFailedError(
            "Training fails on another rank",
            rank=self.failed_ranks,
            actual=self.problem or None,
            remedy="look at that rank's own error",
        )


def is_consequence(error: BaseException) -> bool:
    """Whether an error says that a collective broke, because another rank failed."""
    by_gloo = any(text in str(error) for text in ("gloo/", "Application timeout caused"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and by_gloo)


def meet(where: str, *, consequence: bool, patient: bool) -> Failure:
    """Report to the other ranks that this one failed at a point, and receive their reports.

    The ranks use the store of the process group. A rank that fails alone, within a step, leaves the
    others in a collective. Only the end of its process or the timeout of the group ends that: with
    gloo in torch 2.13, neither abort nor shutdown does. So a `patient` rank waits for a while for
    others that fail too, and then writes that it has given up. The others read this when their
    collective breaks. `consequence`: the error of this rank is such a break.

    Raises RankFailedError if the store does not answer.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Failure()
    try:
        return _meet(where, consequence=consequence, patient=patient)
    except (RuntimeError, dist.DistError) as error:
        raise RankFailedError(
            "Training fails, and the other ranks can no longer be reached",
            actual=str(error).splitlines()[0],
            remedy="look at the output of rank 0 and of the launcher: one of them held the store",
        ) from error


def _meet(where: str, *, consequence: bool, patient: bool) -> Failure:
    group = dist.group.WORLD
    assert group is not None
    store, own = group_store(group), dist.get_rank()
    begin = f"shardckpt/emergency/{next(_meetings)}"
    keys = {rank: f"{begin}/{rank}" for rank in range(dist.get_world_size())}
    store.set(keys[own], f"{where}\n{'consequence' if consequence else ''}")
    give_up_at = time.monotonic() + (current().deadline_s / 3 if patient or consequence else 0.0)
    while not (here := store.check(list(keys.values()))):
        if store.check([f"{begin}/verdict"]) or time.monotonic() > give_up_at:
            break
        time.sleep(0.05)
    # The first rank decides for all. Otherwise one could give up while the last one arrives.
    verdict = store.compare_set(f"{begin}/verdict", "", "met" if here else "given up").decode()
    arrived = {rank: key for rank, key in keys.items() if store.check([key])}
    reports = {rank: store.get(key).decode().split("\n") for rank, key in arrived.items()}
    missing = tuple(rank for rank in keys if rank not in reports)
    first = tuple(rank for rank, (_, follows) in reports.items() if not follows)
    failed_ranks = first or missing
    places = sorted({place for place, _ in reports.values()})
    if verdict == "met" and len(places) == 1:
        return Failure(failed_ranks=failed_ranks)
    if verdict == "met":
        problem = f"the ranks stopped at {places}"
        return Failure(at_one_point=False, failed_ranks=failed_ranks, problem=problem)
    problem = f"ranks {list(missing)} have not failed at the same step"
    chosen = store.compare_set(f"{begin}/elected", "", str(own)).decode()
    return Failure(
        at_one_point=False,
        failed_ranks=failed_ranks,
        problem=problem if missing else "a rank has given up waiting for the others",
        may_save=chosen == str(own),
    )


def group_of_one() -> Any:
    """Create a process group of this rank alone, for a save without the others. Not collective."""
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
