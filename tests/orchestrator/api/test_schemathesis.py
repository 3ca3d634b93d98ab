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
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from schemathesis.openapi.checks import RejectedPositiveData

from orchestrator.api.fields import MAX_TOKENS, Defaults
from orchestrator.api.openapi import document
from orchestrator.ops.keyring import Keyring
from tests.encoding import CLASSIFIES, EMBEDS
from tests.redis import RealRedis

from ..conftest import serving
from ..fake_triton import FakeTriton

TEXT = {"name": "text_input", "datatype": "BYTES", "shape": [1]}
TURN = {"role": "user", "content": "Hola"}
# Why a request of the described form may be refused: what no schema can say.
NO_SCHEMA_SAYS = (
    "there is no text in it",  # where nothing is left of control characters and white space
    "max_tokens and max_completion_tokens differ",
    "sampling_parameters is not valid JSON",
    "which is all that",  # of a vector's dimensions
    "top_logprobs is only allowed with logprobs",
    "echo is not supported together with logprobs",
    "best_of must be an integer from",  # n
    "best_of above n cannot be streamed",
    "answers a request, those to all its prompts together",
    "min_tokens must be an integer from 0 to max_tokens",
    "logit_bias must be an object whose keys are token ids",  # of 31 bits
    "priority: only a key with the scope admin",
)
DOCUMENT = document(Defaults(1.0), 1 << 20, keys_needed=True)
SERVED = {"ChatCompletion": "m", "Completion": "m", "Embeddings": "e", "Classify": "c"}
for _body, _model in SERVED.items():
    DOCUMENT["components"]["schemas"][f"{_body}Request"]["properties"]["model"] = {"const": _model}
OPERATIONS = {f"{method.upper()} {path}" for path, methods in DOCUMENT["paths"].items() for method in methods}


class Described(FakeTriton):
    """A Triton that also tells of its model what `describe` asks, and whose model has room for every request."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters["max_len"] = str(2 * MAX_TOKENS[1])
        self.models |= {"e": "READY", "c": "READY"}
        self.encoders = {"e": {**EMBEDS, "max_len": "1000000"}, "c": {**CLASSIFIES, "max_len": "1000000"}}

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
    """What schemathesis found: failures in words, and how often each operation answered with each status."""

    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)


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
        },
        **config,
    }
    schema = schemathesis.openapi.from_dict(DOCUMENT, config=schemathesis.Config.from_dict(config))

    @schema.hook
    def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
        if isinstance(failure, RejectedPositiveData):
            said = any(words in response.text for words in NO_SCHEMA_SAYS)
            # a generation model knows its own parameters only, other models take any
            unknown = "Unknown parameter: " in response.text and case.path.endswith("/infer")
            return not (said or unknown or _whole_float(case.body))
        # a name may be given in several places, and only the value that counts is looked at
        return not (isinstance(failure, AcceptedNegativeData) and isinstance(case.body, dict) and _twice(case.body))

    outcome = Outcome()
    schemathesis.hook("before_call")(_make_possible)  # schemathesis has it for all schemas only
    try:
        for event in engine.from_schema(schema).execute():
            assert not isinstance(event, (NonFatalError, FatalError)), str(event)
            if isinstance(event, ScenarioFinished):
                _add(outcome, event)
    finally:
        schemathesis.hooks.unregister(_make_possible)
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


def _whole_float(value: Any) -> bool:
    """JSON Schema takes 5.0 for an integer, as which no client writes it; the gateway wants 5."""
    if isinstance(value, dict):
        return any(map(_whole_float, value.values()))
    if isinstance(value, list):
        return any(map(_whole_float, value))
    return isinstance(value, float) and value.is_integer()


def _make_possible(context: Any, case: Any, kwargs: Any) -> None:
    """Make a request of the described form one that the fake model can answer, too."""
    if not case.meta.generation.mode.is_positive or case.method != "POST":
        return
    case.headers.pop("Inference-Header-Content-Length", None)  # it is for binary bodies
    if case.path.endswith("/infer"):
        if case.media_type == "application/octet-stream":
            head = json.dumps({"inputs": [{**TEXT, "parameters": {"binary_data_size": 8}}]}).encode()
            case.headers["Inference-Header-Content-Length"] = str(len(head))
            case.body = head + struct.pack("<I", 4) + b"Hola"
        else:
            case.body = {**case.body, "inputs": [{**TEXT, "data": ["Hola"]}], "outputs": None}
    elif "/generate" in case.path:
        case.body = _one_prompt(case.body)
    else:
        case.body = {**case.body, **({"stream": True} if case.body.get("stream_options") else {})}
        if "messages" in case.body:
            case.body["messages"] = [*case.body["messages"], TURN]


def _one_prompt(body: dict[str, Any]) -> dict[str, Any]:
    """With one of the ways to give a prompt: the one that sampling_parameters has, if any."""
    body = {**body, "parameters": {**(body.get("parameters") or {})}}
    body["parameters"].pop("text_input", None)
    sampling = body.get("sampling_parameters")
    sampling = sampling[0] if isinstance(sampling, list) else sampling
    if isinstance(sampling, dict):
        sampling = body["sampling_parameters"] = {**sampling}
        if sampling.get("messages"):
            sampling["messages"] = [*sampling["messages"], TURN]
            sampling["prompt_token_ids"] = body["text_input"] = None
            return body
        if sampling.get("prompt_token_ids"):
            body["text_input"] = None
            return body
    return {**body, "text_input": "Hola"}


def check(outcome: Outcome) -> None:
    """Nothing was found, and every operation was asked."""
    shown = [f"{label}: {name}: {title}\n{words}" for (label, name, title), words in outcome.failures.items()]
    assert not shown, "\n\n".join(shown)
    assert {label for label, _ in outcome.statuses} == OPERATIONS


def test_what_the_document_says_holds(edge: Edge) -> None:
    """A few requests of every operation, good and bad ones, the same at every run; of one all edges of all values."""
    quick = {"enabled": True, "generation": {"max-examples": 5, "deterministic": True}}
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
        assert outcome.statuses[label, 200], f"{label} never succeeded"
        assert outcome.statuses[label, 400] or label.startswith("GET"), f"{label} never refused"
        assert outcome.statuses[label, 405], f"{label}: no other method was tried"
