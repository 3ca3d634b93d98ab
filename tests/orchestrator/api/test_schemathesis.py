"""schemathesis against the real application, on a socket: it asks what the OpenAPI document allows and what it does
not, and every answer must be one that the document describes.
"""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
import schemathesis
from schemathesis import engine
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.engine.events import FatalError, NonFatalError, PhaseFinished, ScenarioFinished

from orchestrator.api.fields import MAX_TOKENS, Defaults
from orchestrator.api.openapi import document
from orchestrator.ops.keyring import Keyring
from tests.redis import RealRedis

from ..conftest import serving
from ..fake_triton import FakeTriton

TEXT = {"name": "text_input", "datatype": "BYTES", "shape": [1]}
NO_MODEL_CAN = "POST /v1/embeddings"
DOCUMENT = document(Defaults(1.0), 1 << 20, keys_needed=True)
for _body in ("ChatCompletionRequest", "CompletionRequest", "EmbeddingsRequest"):
    DOCUMENT["components"]["schemas"][_body]["properties"]["model"] = {"const": "m"}
OPERATIONS = {f"{method.upper()} {path}" for path, methods in DOCUMENT["paths"].items() for method in methods}


class Described(FakeTriton):
    """A Triton that also tells of its model what `describe` asks, and whose model has room for every request."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters["max_len"] = str(2 * MAX_TOKENS[1])

    def _unary(self, path: str, body: bytes) -> tuple[int, Any]:
        if path.endswith("/stats"):
            return 200, {"model_stats": [{"name": "m", "version": "1"}]}
        if path in ("/v2/models/m", "/v2/models/m/versions/1"):
            tensors = [{"name": "text_input", "datatype": "BYTES", "shape": [1]}]
            return 200, {"name": "m", "versions": ["1"], "platform": "x", "inputs": tensors, "outputs": tensors}
        return super()._unary(path, body)


@dataclass(frozen=True)
class Edge:
    """Where the application serves, and a key that it takes."""

    url: str
    key: str


@dataclass
class Outcome:
    """What schemathesis found: failures in words, how often each operation answered with each status, its phases."""

    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    phases: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    """The application with keys and limits, in a thread of its own."""
    started, served = threading.Event(), {}

    async def serve(redis_url: str) -> None:
        served["loop"], served["stop"] = asyncio.get_running_loop(), asyncio.Event()
        # both sides share one interpreter: its pauses are not the model's
        calm = {"heartbeat_interval_s": 0.2, "heartbeat_timeout_s": 20.0, "stall_s": 20.0, "redis_timeout_s": 5.0}
        limits = {"limit_per_minute": 10**9, "limit_tokens_per_day": 10**12}
        async with Described() as fake:
            async with serving(fake, redis_url=redis_url, auth="keys", **calm, **limits) as stack:
                served["url"] = stack.url
                started.set()
                await served["stop"].wait()
                for connection in stack.server.server_state.connections:  # schemathesis keeps its own
                    connection.transport.abort()

    with RealRedis() as server, redis.Redis.from_url(server.url) as client:
        _, key = Keyring(client).create("acme")
        thread = threading.Thread(target=asyncio.run, args=(serve(server.url),))
        thread.start()
        try:
            assert started.wait(20.0), "the application did not start"
            yield Edge(served["url"], key)
        finally:
            served["loop"].call_soon_threadsafe(served["stop"].set)
            thread.join()


def ask(edge: Edge, config: dict[str, Any]) -> Outcome:
    """Run schemathesis, with the name of a model that is served."""
    config = {
        "base-url": edge.url,
        "auth": {"openapi": {"bearer": {"bearer": edge.key}, "apiKey": {"api_key": edge.key}}},
        "request-timeout": 30.0,
        "generation": {"database": "none", "with-security-parameters": False},
        "parameters": {"path.model": "m", "path.version": "1"},
        "checks": {
            # a request may set itself a deadline that it cannot keep
            "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "504"]},
            # a schema cannot say that a text has words, or that one prompt was given
            "positive_data_acceptance": {"enabled": False},
        },
        **config,
    }
    schema = schemathesis.openapi.from_dict(DOCUMENT, config=schemathesis.Config.from_dict(config))

    @schema.hook
    def map_case(context: Any, case: Any) -> Any:
        if case.meta.generation.mode.is_positive and case.method == "POST":
            case.body, head = _possible(case.operation.path, case.media_type, case.body)
            if head is not None:
                case.headers["Inference-Header-Content-Length"] = head
        return case

    @schema.hook
    def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
        """A name may be given in several places, and only the value that counts is looked at."""
        return not (isinstance(failure, AcceptedNegativeData) and isinstance(case.body, dict) and _twice(case.body))

    outcome = Outcome()
    for event in engine.from_schema(schema).execute():
        if isinstance(event, (NonFatalError, FatalError)):
            raise AssertionError(str(event))
        if isinstance(event, PhaseFinished):
            outcome.phases.add(event.phase.name.value)
        if isinstance(event, ScenarioFinished):
            _add(outcome, event)
    return outcome


def _add(outcome: Outcome, event: ScenarioFinished) -> None:
    recorder = event.recorder
    for exchange in recorder.interactions.values():
        assert exchange.response is not None, f"no answer to {exchange.request.uri}"
        outcome.statuses[recorder.label, exchange.response.status_code] += 1
    for id, checks in recorder.checks.items():
        for check in checks:
            if check.failure_info is None:
                continue
            failure, exchange = check.failure_info.failure, recorder.interactions[id]
            request, response = exchange.request, exchange.response
            outcome.failures.setdefault(
                (recorder.label, check.name, failure.title),
                f"{failure.message}\n{request.method} {request.uri} {request.headers}\n{request.body!r}\n"
                f"{response and (response.status_code, response.content)}",
            )


def _twice(body: dict[str, Any]) -> bool:
    places = [set(body)]
    for value in (body.get("parameters"), body.get("sampling_parameters")):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, dict):
            places.append(set(value))
    return len(set().union(*places)) < sum(map(len, places))


def _possible(path: str, media_type: str, body: Any) -> tuple[Any, str | None]:
    """A request of the described form that the fake model can answer, too; and the length of its JSON if binary."""
    if path.endswith("/infer"):
        if media_type == "application/octet-stream":
            head = json.dumps({"inputs": [{**TEXT, "parameters": {"binary_data_size": 8}}]}).encode()
            return head + struct.pack("<I", 4) + b"Hola", str(len(head))
        return {**body, "inputs": [{**TEXT, "data": ["Hola"]}], "outputs": None}, None
    if "/generate" in path and not any(name in body for name in ("text_input", "sampling_parameters", "parameters")):
        return {**body, "text_input": "Hola"}, None
    return body, None


def check(outcome: Outcome) -> None:
    """Nothing was found, and every operation was asked."""
    shown = [f"{label}: {name}: {title}\n{words}" for (label, name, title), words in outcome.failures.items()]
    assert not shown, "\n\n".join(shown)
    assert {label for label, _ in outcome.statuses} == OPERATIONS


def test_what_the_document_says_holds(edge: Edge) -> None:
    """A few requests of every operation, good and bad ones, the same at every run; of one all edges of all values."""
    quick = {"enabled": True, "generation": {"max-examples": 10, "deterministic": True}}
    others = {"exclude-path": "/v1/completions", "phases": {"coverage": {"enabled": False}}}
    phases = {"fuzzing": quick, "coverage": {"enabled": True}, "stateful": {"enabled": False}}
    outcome = ask(edge, {"seed": 3, "phases": phases, "operations": [others]})
    check(outcome)
    assert {status for _, status in outcome.statuses} >= {200, 400, 401}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_document_says_holds_at_length(edge: Edge) -> None:
    """Many requests of every operation, other ones at every run, the edges of every value, and methods not served."""
    many = {"enabled": True, "generation": {"max-examples": 100}}
    outcome = ask(edge, {"phases": {"fuzzing": many, "coverage": {"enabled": True}, "stateful": {"enabled": False}}})
    check(outcome)
    for label in OPERATIONS:
        assert outcome.statuses[label, 200] or label == NO_MODEL_CAN, f"{label} never succeeded"
        assert outcome.statuses[label, 400] or label.startswith("GET"), f"{label} never refused"
        assert outcome.statuses[label, 405], f"{label}: no other method was tried"
