"""Exchanges between ranks. Each phase of a save or load is one exchange.

Every rank sends its result to rank 0, which decides and answers each rank. An error on one rank
raises an error on all ranks, which names the rank that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import msgspec

from shardckpt import errors
from shardckpt.coordination.base import Coordinator
from shardckpt.errors import RankFailedError, ShardckptError

__all__ = ["Attempt", "attempt", "exchange"]

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """The result of a stage on this rank: a value, or the error that an exchange reports."""

    value: T | None = None
    error: BaseException | None = None

    def get(self) -> T:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return cast("T", self.value)

    def then(self, stage: Callable[..., U], *arguments: Any, **options: Any) -> Attempt[U]:
        """Run the next stage with this value as its first argument; keep an earlier error."""
        if self.error is not None:
            return Attempt(error=self.error)
        return attempt(stage, self.value, *arguments, **options)


def attempt(stage: Callable[..., T], *arguments: Any, **options: Any) -> Attempt[T]:
    """Run a stage, and keep its result or error until an exchange sends it to the other ranks.

    KeyboardInterrupt is kept too, so that the other ranks do not wait.
    """
    try:
        return Attempt(stage(*arguments, **options))
    except BaseException as error:
        return Attempt(error=error)


class _Failure(msgspec.Struct, array_like=True):
    """An exception as plain data. Exceptions themselves may not be picklable."""

    error_name: str
    text: str
    facts: dict[str, Any]
    ranks: tuple[int, ...] = ()


class _Record(msgspec.Struct, array_like=True):
    payload: bytes
    failure: _Failure | None = None


_encode = msgspec.msgpack.Encoder(enc_hook=str).encode


def exchange(
    coordinator: Coordinator,
    phase: str,
    local: Callable[[], bytes],
    decide: Callable[[list[bytes]], bytes | list[bytes]],
) -> bytes:
    """Exchange messages between all ranks, once; collective.

    Args:
        coordinator: The ranks.
        phase: The name of the exchange, for errors.
        local: Returns this rank's message; runs on every rank.
        decide: Takes the messages of all ranks and returns the answer to all, or a list with the
            answer to each; runs on rank 0 alone.

    Returns:
        The answer to this rank.

    Raises:
        BaseException: The error of `local` on this rank, or of `decide` on rank 0.
        ShardckptError: Another rank raised an error. This one names that rank. It has the class of
            the original error if that is one of shardckpt's. Otherwise it is a RankFailedError.
    """
    own_error: BaseException | None = None
    try:
        record = _Record(local())
    except BaseException as error:  # KeyboardInterrupt too: the other ranks must not wait
        own_error = error
        record = _Record(b"", _describe(error))
    records = coordinator.gather(_encode(record), phase=phase)
    answers: list[bytes] | None = None
    decision_error: BaseException | None = None
    if records is not None:
        try:
            answers = _answers(records, decide)
        except BaseException as error:
            decision_error = error
            answers = [_encode(_Record(b"", _describe(error)))] * len(records)
    answer = msgspec.msgpack.decode(coordinator.scatter(answers, phase=phase), type=_Record)
    if own_error is not None:
        if isinstance(own_error, ShardckptError):
            ranks = answer.failure.ranks if answer.failure else ()
            own_error.rank = ranks or coordinator.rank if own_error.rank is None else own_error.rank
            own_error.facts.setdefault("phase", phase)
        raise own_error
    if decision_error is not None:
        raise decision_error
    if answer.failure is not None:
        raise _rebuild(answer.failure, phase)
    return answer.payload


def _answers(
    records: list[bytes], decide: Callable[[list[bytes]], bytes | list[bytes]]
) -> list[bytes]:
    decoded = [msgspec.msgpack.decode(record, type=_Record) for record in records]
    failed = {rank: record.failure for rank, record in enumerate(decoded) if record.failure}
    if failed:
        error_name = next(iter(failed.values())).error_name
        alike = [rank for rank, failure in failed.items() if failure.error_name == error_name]
        first = failed[alike[0]]
        failure = _Failure(first.error_name, first.text, first.facts, tuple(alike))
        return [_encode(_Record(b"", failure))] * len(records)
    answer = decide([record.payload for record in decoded])
    if isinstance(answer, list):
        return [_encode(_Record(payload)) for payload in answer]
    return [_encode(_Record(answer))] * len(records)


def _describe(error: BaseException) -> _Failure:
    if not isinstance(error, ShardckptError):
        cls = type(error)
        try:
            text = _encodable(str(error))
        except Exception:
            text = "(an exception without a text)"
        return _Failure("", f"{cls.__module__}.{cls.__qualname__}: {text}"[:4000], {})
    facts = {
        name: getattr(error, name)
        for name in ("path", "rank", "tensor", "expected", "actual", "remedy", "errno")
        if getattr(error, name, None) is not None
    }
    facts = {name: _encodable(fact) for name, fact in {**facts, **error.facts}.items()}
    return _Failure(type(error).__name__, _encodable(error.message), facts)


def _encodable(fact: Any) -> Any:
    """Replace surrogates, which stand for bytes of a file name that are not UTF-8."""
    return fact.encode(errors="backslashreplace").decode() if isinstance(fact, str) else fact


def _rebuild(failure: _Failure, phase: str) -> ShardckptError:
    """Return the error of this rank for a failure on another rank, or in the decision of rank 0."""
    facts = dict(failure.facts)
    facts.setdefault("phase", phase)
    if isinstance(facts.get("rank"), list):
        facts["rank"] = tuple(facts["rank"])
    if failure.error_name in errors.__all__:
        facts.setdefault("rank", failure.ranks or None)
        error_class: type[ShardckptError] = getattr(errors, failure.error_name)
        return error_class(failure.text, **facts)
    return RankFailedError(
        "Another rank failed",
        rank=failure.ranks or None,
        actual=failure.text,
        remedy="read the log of that rank; nothing was committed",
        **facts,
    )
