"""A real OTLP collector for tests: an HTTP server that keeps what it is sent, and that can hang."""

from __future__ import annotations

import http.server
import re
import threading
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Wire


@dataclass(frozen=True)
class Span:
    """One span as it came: ids as hexadecimal, times in nanoseconds of Unix time, `parent` empty for a root."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    error: bool
    attributes: dict[str, Any]

    def holds(self, other: Span) -> bool:
        return self.start <= other.start <= other.end <= self.end


class Collector:
    """Listens as long as its context lasts. `bodies` are what it was sent; `hang` answers nothing."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.hang = False
        self.over = threading.Event()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if collector.hang:
                    collector.over.wait(60)
                    return
                collector.paths.append(self.path)
                collector.bodies.append(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def spans(self) -> list[Span]:
        """All that has come, as it was sent."""
        return [span for body in self.bodies for span in _spans(_parsed(body))]

    def trees(self) -> list[dict[str, Span]]:
        """For each request to the gateway its span as `server` and those below it by their names, in the order of
        their ends.
        """
        spans = self.spans()
        servers = sorted((span for span in spans if "truthgpt.outcome" in span.attributes), key=lambda span: span.end)
        return [
            {"server": server, **{span.name: span for span in spans if span.parent == server.id}} for server in servers
        ]


def _parsed(body: bytes) -> ExportTraceServiceRequest:
    """A request in either of OTLP's forms; in its JSON one, which Triton sends, ids are hexadecimal."""
    if not body.startswith(b"{"):
        return ExportTraceServiceRequest.FromString(body)
    ids = re.compile(rb'("(?:traceId|spanId|parentSpanId)" *: *")([0-9a-f]*)')
    base64 = ids.sub(lambda found: found[1] + b64encode(bytes.fromhex(found[2].decode())), body)
    return json_format.Parse(base64, ExportTraceServiceRequest(), ignore_unknown_fields=True)


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    span.name,
                    Wire.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code == span.status.STATUS_CODE_ERROR,
                    {item.key: _value(item.value) for item in span.attributes},
                )


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)
