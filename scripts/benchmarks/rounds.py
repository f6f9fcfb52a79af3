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
"""The prefix of contestants that measure the machine and not a library."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """Something to be measured: `run`, between `before` and `after`, which are not.

    `run` returns further figures by name.
    """

    name: str
    run: Callable[[], dict[str, float] | None]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run: seconds, also those among the figures, are those of the slowest rank; all else,
    processor time too, is summed over the ranks."""

    seconds: float
    cpu_seconds: float
    peak_bytes: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Results:
    """Samples by contestant, and why some have none."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    warm_up: dict[str, list[Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    disk_bytes: dict[str, int] = field(default_factory=dict)

    def median(self, name: str, of: str = "seconds") -> float:
        """The median of a figure over the rounds."""
        return statistics.median(
            sample.figures[of] if of in sample.figures else getattr(sample, of)
            for sample in self.samples[name]
        )

    def peak_bytes(self) -> dict[str, float]:
        """The memory added in any round, the first included: buffers may be kept from then on."""
        return {
            name: max(s.peak_bytes for s in samples + self.warm_up.get(name, []))
            for name, samples in self.samples.items()
        }

    def extend(self, later: Results) -> None:
        """Add the samples of another run of the same contestants."""
        self.failures |= later.failures
        for name, samples in later.samples.items():
            self.samples.setdefault(name, []).extend(samples)

    def as_json(self) -> dict[str, Any]:
        """Everything, for --json."""
        return {"samples": {k: [asdict(s) for s in v] for k, v in self.samples.items()}} | {
            "failures": self.failures
        }


def compete(
    place: Place,
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    warm_up: int = 1,
    turn: int = 0,
) -> Results:
    """Run all contestants `warm_up` times unmeasured, then `rounds` times; the same result on
    every rank. The first round begins with contestant number `turn`. One that raises on any rank is
    out.
    """
    results = Results({contestant.name: [] for contestant in contestants})
    running = list(contestants)
    for number in range(warm_up + rounds):
        for contestant in _rotated(running, turn + number):
            sample, failure = _run(contestant, place)
            failures = [text for text in place.gather(failure) if text]
            if failures:
                results.failures[contestant.name] = failures[0]
                del results.samples[contestant.name]
                running.remove(contestant)
                continue
            assert sample is not None
            samples = place.gather(sample)
            kept = results.samples if number >= warm_up else results.warm_up
            kept.setdefault(contestant.name, []).append(_together(samples))
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
        figures={
            key: (max if key.endswith("seconds") else sum)(s.figures[key] for s in samples)
            for key in samples[0].figures
        },
    )
