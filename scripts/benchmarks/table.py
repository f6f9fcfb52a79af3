"""The table: a row for each measurement, with its ratios and its targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rounds import RAW, Results

OWN = "shardckpt"
BASE = "DCP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How shardckpt should stand: `factor` x better than another (DCP), within `factor` x of raw,
    or a figure of at most `limit`."""

    against: str
    factor: float

    def verdict(self, figures: dict[str, float]) -> str | None:
        """The target, the result, and whether it is reached. None without a comparison."""
        own = figures.get(OWN)
        other = self.factor if self.against == "limit" else figures.get(self.against)
        if own is None or other is None:
            return None
        if self.against == "limit":
            return f"at most {self.factor:g}: {_reached(own <= self.factor)}"
        if self.against == RAW:
            found = own / other
            return f"within {self.factor:g} x of raw: {_reached(found <= self.factor)}"
        found = other / own
        return f"{self.factor:g} x {self.against}: {_reached(found >= self.factor)}"


def _reached(yes: bool) -> str:
    return "reached" if yes else "NOT REACHED"


@dataclass(slots=True, kw_only=True)
class Row:
    """One measurement: a figure for each contestant; less is better in all of them."""

    title: str
    unit: str
    figures: dict[str, float]
    targets: Sequence[Target] = ()

    def others(self) -> dict[str, float]:
        """The peers other than default DCP."""
        return {k: v for k, v in self.figures.items() if k not in (OWN, BASE, RAW)}

    def ratios(self) -> dict[str, float]:
        """DCP / shardckpt, best other peer / shardckpt, shardckpt / raw; those that exist."""
        own = self.figures.get(OWN)
        if not own:
            return {}
        found = {}
        if BASE in self.figures:
            found["vs DCP"] = self.figures[BASE] / own
        if self.others():
            found["vs best other"] = min(self.others().values()) / own
        if self.figures.get(RAW):
            found["of raw"] = own / self.figures[RAW]
        return found

    def verdicts(self) -> list[str]:
        """A line for each target, and for the peers: shardckpt should not be slower than any."""
        found = [target.verdict(self.figures) for target in self.targets]
        lines = [line for line in found if line]
        ratio = self.ratios().get("vs best other")
        if self.targets and ratio is not None:
            lines.append(f"no slower than the best other: {_reached(ratio >= 1)}")
        return lines


_SCALE = {"ms": 1e3, "s": 1.0, "MB": 1e-6, "KB": 1e-3, "us": 1e6}


def row(
    title: str,
    unit: str,
    results: Results,
    *targets: Target,
    of: str = "seconds",
    raw: bool = True,
) -> Row:
    """A row of medians; the fastest of the raw contestants stands for the machine."""
    scale = _SCALE[unit]
    names = [name for name in results.samples if raw or not name.startswith(RAW)]
    medians = {name: results.median(name, of) * scale for name in names}
    figures = {name: value for name, value in medians.items() if not name.startswith(RAW)}
    limits = [value for name, value in medians.items() if name.startswith(RAW)]
    if limits:
        figures[RAW] = min(limits)
    return Row(title=title, unit=unit, figures=figures, targets=targets)


def as_text(found: Row) -> str:
    """A row as a few lines for a terminal."""
    cells = [f"{name} {_short(value)}" for name, value in found.figures.items()]
    ratios = [f"{value:.2f} {name}" for name, value in found.ratios().items()]
    lines = [f"{found.title} [{found.unit}]", "   " + "   ".join(cells)]
    if ratios:
        lines.append("   = " + ", ".join(ratios))
    return "\n".join([*lines, *(f"   {line}" for line in found.verdicts())])


def merged(earlier: Sequence[Row], later: Sequence[Row]) -> list[Row]:
    """Rows of several runs: a later one of the same title takes the place of an earlier."""
    rows = {found.title: found for found in [*earlier, *later]}
    return list(rows.values())


def from_json(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows as dataclasses.asdict made them."""
    return [Row(**{**row, "targets": [Target(**t) for t in row["targets"]]}) for row in rows]


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def as_markdown(rows: Sequence[Row]) -> str:
    """All rows as one table."""
    names = list(dict.fromkeys(name for found in rows for name in found.figures if name != RAW))
    ratios = ["vs DCP", "vs best other", "of raw"]
    lines = [
        "| " + " | ".join(["case", *names, RAW, *ratios, "target"]) + " |",
        "|---" * (len(names) + 6) + "|",
    ]
    for found in rows:
        cells = [f"{found.title} ({found.unit})"]
        cells += [
            _short(found.figures[name]) if name in found.figures else "" for name in [*names, RAW]
        ]
        cells += [f"{found.ratios()[r]:.2f} x" if r in found.ratios() else "" for r in ratios]
        cells.append("; ".join(found.verdicts()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
