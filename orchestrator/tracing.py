"""Tracing, by OpenTelemetry: off, and nothing of it is imported, unless a collector is set (`otlp_endpoint`).

No span is made while a request runs. The path has its ids from the beginning, hands them to Triton, and leaves a
Record; a thread turns records into spans and sends them (spans.py).
"""

from __future__ import annotations

import importlib.util
import os

from orchestrator.domain import Record, Trace
from orchestrator.settings import Settings

CLOSE_S = 1.0  # a worker that has drained gets three seconds to end
_SAMPLED = 1  # W3C Trace Context, trace-flags
_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


class TracingMissing(Exception):
    """OpenTelemetry is not installed; the message has the next step."""

    def __init__(self) -> None:
        super().__init__(
            "TRUTHGPT_OTLP_ENDPOINT is set and OpenTelemetry is not installed: pip install 'truthgpt[tracing]'"
        )


def check(settings: Settings) -> None:
    """Raises TracingMissing where traces are to be sent and cannot be."""
    try:
        missing = settings.otlp_endpoint is not None and None in map(importlib.util.find_spec, _NEEDED)
    except ModuleNotFoundError as error:
        raise TracingMissing from error
    if missing:
        raise TracingMissing


class Tracer:
    """Gives requests their place in a trace, and sends what became of the sampled ones. Raises TracingMissing.

    A collector that is away or hangs costs spans, which the log tells of, and never time or memory without bound.
    """

    def __init__(self, settings: Settings) -> None:
        check(settings)
        from orchestrator.spans import Outlet

        self._outlet = Outlet(settings.otlp_endpoint or "")
        # as OpenTelemetry's TraceIdRatioBased, so that all who sample by the id agree
        self._bound = round(settings.trace_ratio * 2**64)

    def begin(self, traceparent: str | None) -> Trace:
        """A request's ids. The client's `traceparent` (W3C, version 00, as the edges check it) is gone on with, and its
        decision kept; without one the share `trace_ratio` of all requests is sampled.
        """
        new = os.urandom(32).hex()
        span_id, upstream_id = new[32:48], new[48:]
        if traceparent is not None:
            _, trace_id, parent_id, flags = traceparent.split("-")
            return Trace(trace_id, parent_id, span_id, upstream_id, bool(int(flags, 16) & _SAMPLED))
        return Trace(new[:32], None, span_id, upstream_id, int(new[16:32], 16) < self._bound)

    def record(self, record: Record) -> None:
        """A sink: the spans of a sampled request are sent soon."""
        if record.trace is not None and record.trace.sampled:
            self._outlet.put(record)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Send what is left, for at most `timeout_s` seconds."""
        self._outlet.close(timeout_s)
