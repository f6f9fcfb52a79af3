"""Contestants take turns, round by round, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.files import peak_memory
from benchmarks.ranks import Place

RAW = "raw"
"""The prefix of contestants that are no library but the machine."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """Something to be measured: `run`, between `before` and `after`, which are not.

    What `run` returns are further figures by name, summed over the ranks.
    """

    name: str
    run: Callable[[], dict[str, float] | None]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run: wall-clock seconds of the slowest rank; all else is summed over the ranks."""

    seconds: float
    cpu_seconds: float
    peak_bytes: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Results:
    """Samples by contestant, and why some have none."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    disk_bytes: dict[str, int] = field(default_factory=dict)

    def median(self, name: str, of: str = "seconds") -> float:
        """The median of a figure over the rounds."""
        return statistics.median(
            sample.figures[of] if of in sample.figures else getattr(sample, of)
            for sample in self.samples[name]
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, for --json."""
        return {"samples": {k: [asdict(s) for s in v] for k, v in self.samples.items()}} | {
            "failures": self.failures
        }


def compete(place: Place, contestants: Sequence[Contestant], *, rounds: int) -> Results:
    """Run all contestants once unmeasured, then `rounds` times; the same result on every rank.

    One that raises on any rank is out.
    """
    results = Results()
    running = list(contestants)
    for number in range(rounds + 1):
        for contestant in _rotated(running, number):
            sample, failure = _run(contestant, place)
            failures = [text for text in place.gather(failure) if text]
            if failures:
                results.failures[contestant.name] = failures[0]
                results.samples.pop(contestant.name, None)
                running.remove(contestant)
                continue
            assert sample is not None
            samples = place.gather(sample)
            if number:
                results.samples.setdefault(contestant.name, []).append(_together(samples))
    return results


def _rotated(items: list[Contestant], by: int) -> list[Contestant]:
    start = by % len(items) if items else 0
    return items[start:] + items[:start]


def _run(contestant: Contestant, place: Place) -> tuple[Sample | None, str]:
    try:
        contestant.before()
        gc.collect()
        place.barrier()
        with peak_memory() as peak:
            cpu, start = time.process_time(), time.perf_counter()
            figures = contestant.run() or {}
            seconds = time.perf_counter() - start
            cpu = time.process_time() - cpu
        place.barrier()
        contestant.after()
    except Exception:
        return None, traceback.format_exc(limit=-3)
    return Sample(
        seconds=seconds, cpu_seconds=cpu, peak_bytes=peak.added_bytes, figures=figures
    ), ""


def _together(samples: list[Sample]) -> Sample:
    return Sample(
        seconds=max(sample.seconds for sample in samples),
        cpu_seconds=sum(sample.cpu_seconds for sample in samples),
        peak_bytes=sum(sample.peak_bytes for sample in samples),
        figures={key: sum(sample.figures[key] for sample in samples) for key in samples[0].figures},
    )
