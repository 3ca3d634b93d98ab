"""docs/observability.md names what logs and spans really have."""

from __future__ import annotations

import json
import re
from pathlib import Path

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from orchestrator import logs
from orchestrator.domain import Trace
from orchestrator.logs import JsonLines
from orchestrator.spans import spans_of
from tests.orchestrator.recording import record

PAGE = (Path(__file__).parent.parent / "docs" / "observability.md").read_text(encoding="utf-8")
NAMED = {name for text in re.findall(r"`([^`]*)`", PAGE) for name in text.split(", ")}


def test_every_field_of_a_line_is_named() -> None:
    """The table of fields has each one that a request's line can have."""
    texts = dict.fromkeys((*logs.COMMON, "input_hash", "traceparent"), "x")
    seconds = dict.fromkeys(("ttft_s", "queue_s", "upstream_s"), 0.0)
    full = record(**texts, **seconds, degraded=True, sanitized=("x",))
    fields = {"exception", "traceback", *json.loads(JsonLines(debug=False, worker=1).request(full, 0.0))}
    assert fields <= NAMED and {*texts, *seconds, "worker", "request_id", "duration_s"} <= fields


def test_every_attribute_of_a_span_is_named() -> None:
    """The page has each attribute that a span can have, and no other of ours or of the conventions' for AI."""
    changes = dict.fromkeys(("cache", "fallback", "refused", "shadow", "error"), "x")
    found = set()
    for route, edge in (("POST /v1/completions", "openai"), ("inference.GRPCInferenceService/ModelInfer", "grpc")):
        full = record(
            trace=Trace("1" * 32, None, "2" * 16, "3" * 16, sampled=True), route=route, edge=edge, outcome="error",
            sanitized=("x",), upstream_s=0.01, queue_s=0.0, stages=(("prepare", 0.0), ("limits and cache", 0.0)),
            **changes,
        )  # fmt: skip
        for span in spans_of(full, Resource({}), InstrumentationScope("test")):
            found |= set(span.attributes or {})
    assert found <= NAMED
    assert {name for name in NAMED if name.startswith(("truthgpt.", "gen_ai.", "http.", "rpc."))} <= found
