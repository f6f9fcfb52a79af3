"""Spans of OpenTelemetry and metrics of Prometheus for saves and loads.

Both are handlers of the logger `shardckpt.reports`, which gets a record at the end of each save and
load. Names of attributes and metrics begin with `shardckpt`, and end in their unit. The conventions
are those of https://opentelemetry.io/docs/specs/semconv/general/naming/ and
https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from shardckpt.errors import DependencyError, StateError, printable

__all__ = ["OpenTelemetryHandler", "PrometheusHandler"]


class OpenTelemetryHandler(logging.Handler):
    """Makes a span for each save and load of this rank, with a child for each phase.

    The spans are `shardckpt.save` and `shardckpt.load`. Their attributes are `shardckpt.path`,
    `shardckpt.rank`, `shardckpt.checkpoint_id` and `shardckpt.bytes`: the bytes that this rank
    saved or read. A call that raises sets the status of its span to ERROR. Not collective.

    Args:
        tracer_provider: The provider of OpenTelemetry's SDK. By default the global one.

    Raises:
        DependencyError: The extra `telemetry` is not installed.

    Example:
        >>> import logging, shardckpt, torch
        >>> from shardckpt.integrations.telemetry import OpenTelemetryHandler
        >>> handler = OpenTelemetryHandler()
        >>> logging.getLogger("shardckpt.reports").addHandler(handler)
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> logging.getLogger("shardckpt.reports").removeHandler(handler)
    """

    def __init__(self, tracer_provider: Any = None) -> None:
        super().__init__()
        try:
            from opentelemetry import trace
        except ImportError as error:
            raise _missing("opentelemetry", error) from error
        self._trace = trace
        self._tracer = self._trace.get_tracer("shardckpt", tracer_provider=tracer_provider)

    def emit(self, record: logging.LogRecord) -> None:
        """Make the spans of a record."""
        try:
            self._emit(record)
        except Exception:
            self.handleError(record)

    def _emit(self, record: Any) -> None:
        phases = list(_phases(record))
        begun_ns = min([record.begun_ns, *(begun for _, begun, _ in phases)])
        span = self._tracer.start_span(
            f"shardckpt.{record.call}", start_time=begun_ns, attributes=_attributes(record)
        )
        inside = self._trace.set_span_in_context(span)
        for name, begun, ended in phases:
            child = self._tracer.start_span(
                f"shardckpt.{record.call}.{name}", context=inside, start_time=begun
            )
            child.end(end_time=ended)
        if record.error is not None:
            span.record_exception(record.error)
            description = type(record.error).__name__
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, description))
        span.end(end_time=record.ended_ns)


class PrometheusHandler(logging.Handler):
    """Counts the saves and loads of this rank, their bytes and their seconds.

    | Metric | Type | Labels |
    |---|---|---|
    | `shardckpt_calls_total` | counter | `call`, and `outcome`: "ok" or the class of the error |
    | `shardckpt_bytes_total` | counter of the bytes that this rank saved or read | `call` |
    | `shardckpt_seconds` | histogram of the time of a call, without staging | `call` |

    Not collective. Publish the registry as your program does, for instance with
    `prometheus_client.start_http_server`.

    Args:
        registry: The registry of the metrics. By default the global one.

    Raises:
        DependencyError: The extra `telemetry` is not installed.
        StateError: The registry has the metrics of another handler.

    Example:
        >>> import logging, prometheus_client, shardckpt, torch
        >>> from shardckpt.integrations.telemetry import PrometheusHandler
        >>> registry = prometheus_client.CollectorRegistry()
        >>> handler = PrometheusHandler(registry)
        >>> logging.getLogger("shardckpt.reports").addHandler(handler)
        >>> report = shardckpt.save({"weight": torch.ones(3)}, "run/step-1")
        >>> logging.getLogger("shardckpt.reports").removeHandler(handler)
        >>> labels = {"call": "save", "outcome": "ok"}
        >>> registry.get_sample_value("shardckpt_calls_total", labels)
        1.0
    """

    def __init__(self, registry: Any = None) -> None:
        super().__init__()
        try:
            import prometheus_client as client
        except ImportError as error:
            raise _missing("prometheus_client", error) from error
        options: Any = {"registry": client.REGISTRY if registry is None else registry}
        try:
            self._calls = client.Counter(
                "shardckpt_calls", "Saves and loads by outcome.", ["call", "outcome"], **options
            )
        except ValueError as error:
            raise StateError(
                "This registry has the metrics of shardckpt already",
                expected="one PrometheusHandler for each registry",
                actual=str(error),
                remedy="keep the first handler, or pass another registry",
            ) from error
        self._bytes = client.Counter(
            "shardckpt_bytes", "Bytes that this rank saved or read.", ["call"], **options
        )
        self._seconds = client.Histogram(
            "shardckpt_seconds",
            "Seconds of saves and loads.",
            ["call"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
            **options,
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record."""
        try:
            self._emit(record)
        except Exception:
            self.handleError(record)

    def _emit(self, record: Any) -> None:
        outcome = "ok" if record.error is None else type(record.error).__name__
        self._calls.labels(record.call, outcome).inc()
        self._seconds.labels(record.call).observe((record.ended_ns - record.begun_ns) / 1e9)
        if record.report is not None:
            self._bytes.labels(record.call).inc(_own_bytes(record))


def _own_bytes(record: Any) -> int:
    """Return the bytes that this rank saved or read."""
    report = record.report
    return int(report.bytes_read if record.call == "load" else report.bytes_by_rank[record.rank])


def _attributes(record: Any) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "shardckpt.path": printable(record.path),  # exporters refuse bytes that are not UTF-8
        "shardckpt.rank": record.rank,
    }
    if record.report is not None:
        attributes["shardckpt.checkpoint_id"] = record.report.checkpoint_id
        attributes["shardckpt.bytes"] = _own_bytes(record)
    return attributes


def _phases(record: Any) -> Iterator[tuple[str, int, int]]:
    """Yield (name, begin, end) of each phase. The last one ends with the call."""
    seconds = record.report.seconds if record.report is not None else {}
    at = record.ended_ns - round(sum(seconds.values()) * 1e9)
    for name, duration_s in seconds.items():
        begun, at = at, at + round(duration_s * 1e9)
        yield name, begun, at


def _missing(module: str, error: ImportError) -> DependencyError:
    return DependencyError(
        "A package for telemetry is not installed",
        expected=f"the module {module}",
        actual=str(error),
        remedy='pip install "shardckpt[telemetry]"',
    )
