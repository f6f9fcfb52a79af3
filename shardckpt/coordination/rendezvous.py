"""The rendezvous: how ranks meet at the start of an operation, for all coordinators.

Every rank calls rank 0 with the subject of its operation. Rank 0 waits for all calls, decides, and
sends each rank one of these texts:

    go ID             the id of the operation in which the rank takes part
    late RANKS        the ranks that did not call in time
    other RANK TEXT   a rank that called with another subject, and that subject
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from shardckpt.config import current
from shardckpt.coordination.deadlines import rank_failed, ranks_disagree
from shardckpt.errors import ShardckptError

__all__ = ["Decision", "decide", "follow", "never_called", "too_late"]


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision of rank 0: the answer to every rank, and the error that rank 0 raises.

    `identity` is the id of the operation. It starts only if `error` is None. `late` are the ranks
    that did not call.
    """

    answer: str
    identity: str
    late: list[int]
    error: ShardckptError | None


def decide(subjects: Mapping[int, str], subject: str, *, world_size: int) -> Decision:
    """Decide on an operation from the subjects of the ranks that called in time."""
    identity = uuid.uuid4().hex
    late = [rank for rank in range(1, world_size) if rank not in subjects]
    if late:
        return Decision(f"late {','.join(map(str, late))}", identity, late, never_called(late))
    odd = next((rank for rank, theirs in sorted(subjects.items()) if theirs != subject), None)
    if odd is not None:
        error = ranks_disagree(odd, subjects[odd], subject)
        return Decision(f"other {odd} {subjects[odd]}", identity, [], error)
    return Decision(f"go {identity}", identity, [], None)


def follow(answer: str, subject: str, *, rank: int) -> str:
    """Return the id of the operation in rank 0's answer.

    Raises:
        RankFailedError: Some ranks did not call; `error.rank` names them.
        RankMismatchError: A rank called with another subject.
    """
    verdict, _, text = answer.partition(" ")
    if verdict == "late":
        raise rank_failed(map(int, text.split(",")), "begin", "did not call in time")
    if verdict == "other":
        odd, _, theirs = text.partition(" ")
        raise ranks_disagree(int(odd), theirs, subject if int(odd) != rank else None)
    return text


def never_called(ranks: list[int]) -> ShardckptError:
    """Return the error for ranks that did not call before the deadline."""
    return rank_failed(ranks, "begin", f"no call within {current().arrival_deadline_s:g} s")


def too_late(rank: int) -> ShardckptError:
    """Return the error for a rank that calls after the other ranks have given it up."""
    return rank_failed([rank], "begin", "this rank came too late: the others have given up")
