"""What a request leaves in the series, and that no client can make one."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from orchestrator.api.middleware import FrontDoor
from orchestrator.domain import Caller, Record
from orchestrator.errors import Unauthenticated
from orchestrator.incident import Incident
from orchestrator.metrics import Labels, Metrics

from .conftest import Stack

RECORD = Record(
    id="r1", caller="k1", tenant="acme", operation="generate", task="translation", model="demo", stream=True,
    outcome="ok", error=None, finish_reason="stop", prompt_tokens=3, completion_tokens=5, accepted=0.0, ttft_s=0.5,
    duration_s=2.5, traceparent=None, edge="openai", cache="miss", limited=True, upstream_s=2.25, queue_s=0.125,
    stages=(("prepare", 0.125), ("limits and cache", 0.25), ("answer", 2.5)),
)  # fmt: skip


def record(**changes: Any) -> Record:
    return Record(**{**vars(RECORD), **changes})


def after(*records: Record, metrics: Metrics | None = None) -> dict[tuple[str, *Labels], float | tuple[int, float]]:
    """(series, label values) -> count, or (observations, their sum) of a histogram."""
    metrics = metrics or Metrics({"demo", "small"}.__contains__)
    for one in records:
        metrics.record(one)
    values: dict[tuple[str, *Labels], float | tuple[int, float]] = {}
    for name, rows in metrics.snapshot().items():
        for *labels, value in rows:
            key = (name.removeprefix("truthgpt_"), *map(str, labels))
            values[key] = (int(sum(value[:-1])), value[-1]) if isinstance(value, list) else float(str(value))
    return values


def test_a_generated_answer_is_in_every_series_that_it_concerns() -> None:
    """Outcome, durations, first token, time a token, queue, overhead, stages, tokens, cache and limit, each once."""
    assert after(RECORD) == {
        ("requests_total", "generate", "openai", "ok"): 1,
        ("request_duration_seconds", "demo", "generate", "ok"): (1, 2.5),
        ("generations_total", "demo", "ok"): 1,
        ("generation_duration_seconds", "demo"): (1, 2.5),
        ("time_to_first_token_seconds", "demo"): (1, 0.5),
        ("time_per_output_token_seconds", "demo"): (1, 0.5),
        ("queue_seconds", "demo"): (1, 0.125),
        ("overhead_seconds", "generate"): (1, 0.25),
        ("stage_seconds", "prepare"): (1, 0.125),
        ("stage_seconds", "limits and cache"): (1, 0.125),
        ("stage_seconds", "answer"): (1, 2.25),
        ("tokens_total", "demo", "prompt"): 3,
        ("tokens_total", "demo", "completion"): 5,
        ("cache_requests_total", "translation", "miss"): 1,
        ("limit_decisions_total", "generate", "allowed"): 1,
    }


def test_a_cached_answer_flatters_no_model() -> None:
    """A hit counts as an answer and its tokens as cached; the model's own times and tokens stay as they are."""
    values = after(record(cache="hit", upstream_s=None, queue_s=None, duration_s=0.5))
    assert values["generations_total", "demo", "ok"] == 1 and values["cache_requests_total", "translation", "hit"] == 1
    assert values["overhead_seconds", "generate"] == (1, 0.5)
    assert {key: value for key, value in values.items() if key[0] == "tokens_total"} == {
        ("tokens_total", "demo", "cached"): 5
    }
    assert not [key for key in values if key[0].startswith(("time_", "queue_"))]


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [("rate_limited", "refused"), ("invalid_argument", "refused"), ("not_found", "refused"),
     ("unsafe_input", "refused"),
     ("unavailable", "error"), ("overloaded", "error"), ("deadline_exceeded", "error"), ("internal", "error")],
)  # fmt: skip
def test_who_is_at_fault_tells_the_outcome(kind: str, outcome: str) -> None:
    """What the caller did wrong is refused, what the service could not do is an error; neither counts as an answer."""
    values = after(record(outcome="error", error=kind, ttft_s=None, completion_tokens=0, queue_s=None))
    assert values["requests_total", "generate", "openai", outcome] == 1 == values["errors_total", kind]
    assert values["generations_total", "demo", outcome] == 1
    assert ("generation_duration_seconds", "demo") not in values


def test_limits_say_what_they_decided() -> None:
    """Allowed, refused and shadow are told apart, and a caller without limits is not counted."""
    refused = record(outcome="error", error="rate_limited", refused="minute")
    values = after(refused, record(shadow="day"), RECORD, RECORD, record(limited=False))
    decisions = {key[2]: value for key, value in values.items() if key[0] == "limit_decisions_total"}
    assert decisions == {"refused": 1, "shadow": 1, "allowed": 2}


def test_a_fallback_counts_for_who_answered() -> None:
    """Tokens and times of another model's answer are that model's; a fixed text has none."""
    values = after(record(fallback="model=small"), record(fallback="text"))
    assert values["fallbacks_total", "demo"] == 2
    assert values["tokens_total", "small", "completion"] == 5
    assert [key for key in values if key[0] == "time_to_first_token_seconds"] == [
        ("time_to_first_token_seconds", "small")
    ]


def test_a_cancelled_answer_has_no_pace() -> None:
    """Who hung up was neither answered nor refused; what was generated until then counts."""
    values = after(record(outcome="cancelled", finish_reason=None))
    assert values["requests_total", "generate", "openai", "cancelled"] == 1
    assert values["tokens_total", "demo", "completion"] == 5
    assert ("time_per_output_token_seconds", "demo") not in values and not [k for k in values if k[0] == "errors_total"]


def test_attempts_and_incidents_are_counted() -> None:
    """Each attempt at Triton by its outcome, each refusal before the path by its kind; an admin's call is no error."""
    metrics = Metrics({"demo"}.__contains__)
    for outcome in ("ok", "error", "error"):
        metrics.upstream("demo", outcome)
    for kind in ("unauthenticated", "admin"):
        metrics.incident(Incident(kind=kind, id="r", edge="openai", operation="", caller="", address="", at=0.0))
    assert after(metrics=metrics) == {
        ("upstream_requests_total", "demo", "ok"): 1,
        ("upstream_requests_total", "demo", "error"): 2,
        ("errors_total", "unauthenticated"): 1,
    }


def test_a_reading_that_fails_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """One part that cannot be read is logged, and everything else is in the snapshot all the same."""
    metrics = Metrics(lambda model: True)

    def broken() -> dict[Labels, float]:
        raise RuntimeError("gone")

    metrics.readings |= {"truthgpt_redis_up": broken, "truthgpt_in_flight": lambda: {(): 2}}
    assert after(RECORD, metrics=metrics)["in_flight",] == 2
    assert "truthgpt_redis_up cannot be read" in caplog.text


async def test_clients_can_make_no_series() -> None:
    """Ten thousand users, keys, model names, ids and paths leave as many series as the first of them."""
    metrics = Metrics({"demo"}.__contains__)

    def identify(headers: dict[bytes, bytes], address: str) -> Caller:
        raise Unauthenticated

    door = FrontDoor({"/v1/models/{model}": {"GET": pytest.fail}}, 1000, identify, metrics.incident)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    sizes = []
    for number in range(10_000):
        name = f"{number}é" * (number % 5 + 1)
        metrics.record(record(id=name, caller=name, tenant=name, model=name, input_hash=name))
        metrics.record(record(fallback=f"model={name}"))
        metrics.upstream(name, "ok")
        path = f"/v1/models/{number}" if number % 2 else f"/{number}"
        headers = [(b"x-request-id", b"%d" % number), (b"authorization", b"Bearer %d" % number)]
        scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "headers": headers,
                 "client": (f"10.0.{number >> 8}.{number & 255}", 1)}  # fmt: skip
        await door(scope, receive, send)
        if number in (1, 9_999):
            sizes.append(sum(map(len, metrics.snapshot().values())))
    assert sizes[0] == sizes[1] < 40
    values = after(metrics=metrics)
    assert values["upstream_requests_total", "unknown", "ok"] == 10_000
    assert values["errors_total", "unauthenticated"] == 5_000


async def test_a_model_that_is_not_served_is_unknown(stack: Stack) -> None:
    """The real gateway's own series have the served model's name and, for whatever else clients ask, one more."""
    for name in ("m", "nothing", "x" * 300, "drop table"):
        await stack.post("/v1/completions", {"model": name, "prompt": "Hola"})
    assert len(stack.records) == 4
    metrics = stack.server.config.app.metrics  # type: ignore[union-attr]
    rows = json.loads(json.dumps(metrics.snapshot()))["truthgpt_generations_total"]
    assert sorted(rows) == [["m", "ok", 1], ["unknown", "refused", 3]]


def test_a_request_costs_less_than_twenty_microseconds() -> None:
    """All series of a generated answer and of its attempt together, in CPU time of the best of many rounds."""
    metrics = Metrics({"demo"}.__contains__)

    def spent_s() -> float:
        began = time.process_time()
        for _ in range(500):
            metrics.record(RECORD)
            metrics.upstream("demo", "ok")
        return (time.process_time() - began) / 500

    assert min(spent_s() for _ in range(20)) < 20e-6
