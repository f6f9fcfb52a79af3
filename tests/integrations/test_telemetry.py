"""Spans and metrics of saves and loads, by the SDKs of OpenTelemetry and Prometheus."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

import shardckpt
from shardckpt.integrations.telemetry import OpenTelemetryHandler, PrometheusHandler

export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
prometheus_client = pytest.importorskip("prometheus_client")
REPORTS = logging.getLogger("shardckpt.reports")


@pytest.fixture
def attach():
    attached = []

    def attach(handler):
        REPORTS.addHandler(handler)
        attached.append(handler)
        return handler

    yield attach
    for handler in attached:
        REPORTS.removeHandler(handler)


@pytest.fixture
def spans(attach):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter, provider = export.InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    attach(OpenTelemetryHandler(provider))
    return exporter


@pytest.fixture
def registry(attach):
    registry = prometheus_client.CollectorRegistry()
    attach(PrometheusHandler(registry))
    return registry


def test_a_path_that_is_not_utf_8_is_escaped(tmp_path, spans):
    shardckpt.save({"w": torch.ones(1)}, f"{tmp_path}/\udcff")
    path = spans.get_finished_spans()[-1].attributes["shardckpt.path"]
    assert path.encode().endswith(b"/\\udcff")


def test_a_save_is_a_span_with_its_phases(tmp_path, spans):
    report = shardckpt.save({"w": torch.ones(100)}, tmp_path / "c")
    *phases, span = spans.get_finished_spans()
    assert span.name == "shardckpt.save"
    assert span.attributes == {
        "shardckpt.path": str(tmp_path / "c"),
        "shardckpt.rank": 0,
        "shardckpt.checkpoint_id": report.checkpoint_id,
        "shardckpt.bytes": report.bytes_by_rank[0],
    }
    assert [phase.name for phase in phases] == [f"shardckpt.save.{name}" for name in report.seconds]
    for phase, seconds in zip(phases, report.seconds.values(), strict=True):
        assert phase.parent.span_id == span.context.span_id
        assert phase.end_time - phase.start_time == pytest.approx(seconds * 1e9, abs=2)
        assert span.start_time <= phase.start_time <= phase.end_time <= span.end_time


def test_a_save_in_the_background_is_a_span_that_begins_with_its_staging(tmp_path, spans):
    shardckpt.async_save({"w": torch.ones(100)}, tmp_path / "c").result()
    assert "shardckpt.save" in [span.name for span in spans.get_finished_spans()]


def test_an_error_is_in_the_span_and_in_the_counter(tmp_path, spans, registry):
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    with pytest.raises(shardckpt.LoadMismatchError):
        shardckpt.load({"w": torch.ones(4)}, tmp_path / "c")
    span = spans.get_finished_spans()[-1]
    assert (span.name, span.status.description) == ("shardckpt.load", "LoadMismatchError")
    assert not span.status.is_ok
    assert [event.name for event in span.events] == ["exception"]
    labels = {"call": "load", "outcome": "LoadMismatchError"}
    assert registry.get_sample_value("shardckpt_calls_total", labels) == 1
    assert registry.get_sample_value("shardckpt_bytes_total", {"call": "load"}) is None


def test_calls_bytes_and_seconds_are_counted(tmp_path, registry):
    saved = read = 0
    for step in range(3):
        state = {"w": torch.ones(1000), "step": step}
        saved += sum(shardckpt.save(state, tmp_path / f"{step}").bytes_by_rank)
        read += shardckpt.load(state, tmp_path / f"{step}").bytes_read
    for call, size_bytes in (("save", saved), ("load", read)):
        labels = {"call": call, "outcome": "ok"}
        assert registry.get_sample_value("shardckpt_calls_total", labels) == 3
        assert registry.get_sample_value("shardckpt_bytes_total", {"call": call}) == size_bytes
        assert registry.get_sample_value("shardckpt_seconds_count", {"call": call}) == 3
        assert registry.get_sample_value("shardckpt_seconds_sum", {"call": call}) > 0


def test_records_reach_no_other_logger(tmp_path, monkeypatch):
    names = []
    root = logging.getLogger()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: names.append(record.name))
    monkeypatch.setattr(root, "handlers", [handler])  # caplog also listens to other loggers
    monkeypatch.setattr(root, "level", logging.INFO)
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    assert "shardckpt.reports" not in names


def test_a_handler_that_fails_fails_no_save(tmp_path, attach, capsys):
    class Broken(PrometheusHandler):
        def _emit(self, record):
            raise ValueError("broken handler")

    attach(Broken(prometheus_client.CollectorRegistry()))
    shardckpt.save({"w": torch.ones(3)}, tmp_path / "c")
    assert "broken handler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "handler"),
    [("opentelemetry", OpenTelemetryHandler), ("prometheus_client", PrometheusHandler)],
)
def test_a_missing_package_names_the_extra(module, handler, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(shardckpt.DependencyError, match=r"shardckpt\[telemetry\]"):
        handler()


def test_a_registry_takes_the_metrics_once():
    registry = prometheus_client.CollectorRegistry()
    PrometheusHandler(registry)
    with pytest.raises(shardckpt.StateError, match="keep the first handler"):
        PrometheusHandler(registry)
