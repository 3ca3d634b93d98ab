"""A request's Record as OpenTelemetry's spans, sent by OTLP over HTTP. Imported only where tracing is switched on.

    POST /v1/chat/completions       server; the client's span is its parent
    ├── prepare                     sanitise, fit into the model
    ├── limits and cache            one round trip to Redis
    └── chat MODEL                  client: the call to Triton, whose own spans hang below it;
                                    or "shared answer", the wait for the same request of somebody else

Names and attributes are those of OpenTelemetry's conventions for HTTP, RPC and generative AI, and `truthgpt.*`. None
has text of a prompt or an answer, a key, or who asked.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from importlib.metadata import version
from typing import cast

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN_ID, INVALID_TRACE_ID, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from orchestrator.domain import Record, Trace
from orchestrator.errors import CALLERS_FAULT
from orchestrator.masking import masked

PATH = "/v1/traces"
EXPORT_S = 5.0  # of one batch, retries included
STAGES = ("prepare", "limits and cache")

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET, _FAILED = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
_Attributes = dict[str, AttributeValue]


class Ended:
    """A record in the SDK's queue. Its spans are made by the thread that sends them, and not on the event loop."""

    context = SpanContext(INVALID_TRACE_ID, INVALID_SPAN_ID, is_remote=False, trace_flags=_SAMPLED)  # all it looks at

    def __init__(self, record: Record) -> None:
        self.record = record


class _Expand(SpanExporter):
    """Turns the queue's records into spans."""

    def __init__(self, exporter: SpanExporter, resource: Resource, scope: InstrumentationScope) -> None:
        self._exporter, self._resource, self._scope = exporter, resource, scope
        self._over = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._over:
            return SpanExportResult.FAILURE
        ended = cast(Sequence[Ended], spans)
        return self._exporter.export(
            [span for one in ended for span in spans_of(one.record, self._resource, self._scope)]
        )

    def shutdown(self) -> None:
        if not self._over:
            self._over = True
            self._exporter.shutdown()


class Outlet:
    """A bounded queue of records and a thread that sends their spans to the collector at `endpoint`.

    `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SERVICE_NAME` and their like are heeded as the SDK does.
    """

    def __init__(self, endpoint: str) -> None:
        url = endpoint.rstrip("/")
        release = version("truthgpt")
        name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "truthgpt"}
        resource = Resource.create(
            {**name, "service.version": release, "service.instance.id": f"{socket.gethostname()}-{os.getpid()}"}
        )
        otlp = OTLPSpanExporter(url if url.endswith(PATH) else url + PATH, timeout=EXPORT_S)
        self._exporter = _Expand(otlp, resource, InstrumentationScope("truthgpt", release))
        self._processor = BatchSpanProcessor(self._exporter)

    def put(self, record: Record) -> None:
        """Queue a record. A full queue loses its oldest one, and the SDK logs that it does."""
        self._processor.on_end(cast(ReadableSpan, Ended(record)))

    def close(self, timeout_s: float) -> None:
        """Send what is queued, for at most `timeout_s` seconds; the rest is dropped."""
        # the SDK's own patience with a collector that hangs is half a minute
        sending = threading.Thread(target=self._processor.shutdown, name="tracing ends", daemon=True)
        sending.start()
        sending.join(timeout_s)
        self._exporter.shutdown()


def spans_of(record: Record, resource: Resource, scope: InstrumentationScope) -> list[ReadableSpan]:
    """The spans of a record that has a trace: the request's, then those below it."""
    trace = cast(Trace, record.trace)
    start_ns = int(record.accepted * 1e9)

    def span(
        id: str, parent: SpanContext | None, name: str, kind: SpanKind, begin_s: float, end_s: float,
        attributes: _Attributes, status: Status = _UNSET,
    ) -> ReadableSpan:  # fmt: skip
        return ReadableSpan(
            name, context=_context(trace.trace_id, id), parent=parent, kind=kind, attributes=attributes, status=status,
            resource=resource, instrumentation_scope=scope,
            start_time=start_ns + int(begin_s * 1e9), end_time=start_ns + int(end_s * 1e9),
        )  # fmt: skip

    client = None if trace.parent_id is None else _context(trace.trace_id, trace.parent_id, remote=True)
    failed, whole_s = record.outcome == "error", record.duration_s
    # by the conventions what is the client's fault fails a server's span no more than a 404 does
    status = _FAILED if failed and record.error not in CALLERS_FAULT else _UNSET
    name = record.route or f"{record.edge} {record.operation}"
    spans = [span(trace.span_id, client, name, SpanKind.SERVER, 0.0, whole_s, _request(record), status)]

    own, begin_s, ends = _context(trace.trace_id, trace.span_id), 0.0, dict(record.stages)
    for stage in STAGES:
        end_s = ends.get(stage, whole_s)  # a stage without an end is where the request itself ended
        spans.append(span(os.urandom(8).hex(), own, stage, SpanKind.INTERNAL, begin_s, end_s, {}))
        if stage not in ends:
            return spans
        begin_s = end_s

    if record.upstream_s is not None:
        shared = record.cache == "hit"  # and yet not from the cache
        name, kind = ("shared answer", SpanKind.INTERNAL) if shared else (_call(record), SpanKind.CLIENT)
        status = _FAILED if failed else _UNSET
        begin_s = whole_s - record.upstream_s
        spans.append(span(trace.upstream_id, own, name, kind, begin_s, whole_s, _answer(record, begin_s), status))
    return spans


def _context(trace_id: str, span_id: str, remote: bool = False) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=remote, trace_flags=_SAMPLED)


def _request(record: Record) -> _Attributes:
    attributes: _Attributes = {
        "truthgpt.request_id": masked(record.id),
        "truthgpt.operation": record.operation,
        "truthgpt.task": record.task,
        "truthgpt.outcome": record.outcome,
        "gen_ai.request.model": masked(record.model),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
    }
    method, _, route = record.route.partition(" ")
    if record.edge == "grpc":
        attributes |= {"rpc.system.name": "grpc", "rpc.method": record.route}
    elif route:
        attributes |= {"http.request.method": method, "http.route": route}
    attributes |= {
        f"truthgpt.{name}": value
        for name in ("cache", "fallback", "refused", "shadow", "sanitized")
        if (value := getattr(record, name))
    }
    return attributes | _error(record)


def _answer(record: Record, asked_s: float) -> _Attributes:
    attributes: _Attributes = {
        "gen_ai.provider.name": "truthgpt",
        "gen_ai.request.model": masked(record.model),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
    }
    name = _gen_ai_operation(record)
    if name:
        attributes["gen_ai.operation.name"] = name
    if record.finish_reason:
        attributes["gen_ai.response.finish_reasons"] = (record.finish_reason,)
    if record.ttft_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = record.ttft_s - asked_s
    if record.queue_s is not None:
        attributes["truthgpt.queue_s"] = record.queue_s
    return attributes | _error(record)


def _error(record: Record) -> _Attributes:
    return {"error.type": record.error} if record.error else {}


def _gen_ai_operation(record: Record) -> str:
    if record.route.endswith("/chat/completions"):
        return "chat"
    return {"generate": "text_completion", "embed": "embeddings"}.get(record.operation, "")


def _call(record: Record) -> str:
    return f"{_gen_ai_operation(record) or record.operation} {masked(record.model)}"
