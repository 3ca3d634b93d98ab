"""The series of a running stack, as Prometheus reads them from the ops port."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from orchestrator.metrics_table import TABLE
from tests.clock import awake

from .stack import Stack, wait_until
from .test_backend import raw_stream

Samples = dict[tuple[str, ...], float]


def scrape(stack: Stack) -> Samples:
    """(name, label values sorted by label) -> value."""
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    began = awake()
    status, headers, text = stack.request("GET", "/metrics", port="OPS", headers=accept)
    assert status == 200 and headers["content-type"].startswith("application/openmetrics-text")
    assert awake() - began < 1.0
    families = list(text_string_to_metric_families(text.decode()))
    assert {family.name for family in families} == {name.removesuffix("_total") for name in TABLE}
    return {
        (
            sample.name.removeprefix("truthgpt_"),
            *(sample.labels[label] for label in sorted(sample.labels)),
        ): sample.value
        for family in families
        for sample in family.samples
    }


def after(stack: Stack, before: Samples, *key: str, rises_to: float) -> Samples:
    """How much each series has grown, once this one has grown so much: workers speak once a second."""
    grown: Samples = {}

    def looks() -> bool:
        now = scrape(stack)
        grown.clear()
        grown.update({each: now[each] - before.get(each, 0.0) for each in now})
        return grown.get(key, 0.0) >= rises_to

    wait_until(looks, 5, f"{key} rises to {rises_to}")
    return grown


@pytest.fixture
def settled(stack: Stack) -> Samples:
    """The series once what earlier tests did is in them: whatever came before a request that is counted."""
    before = scrape(stack)
    assert stack.request("GET", "/settled")[0] == 404
    after(stack, before, "errors_total", "not_found", rises_to=1)
    return scrape(stack)


def seed() -> int:
    """Another one each time, so that no answer is in the cache."""
    return time.time_ns() % 2**31


def complete(stack: Stack, prompt: str, key: str | None = None, **body: object) -> int:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": stack.model, "prompt": prompt, "max_tokens": 4, **body}
    return int(stack.request("POST", "/v1/completions", body, headers=headers)[0])


def events(sock: socket.socket) -> list[dict[str, Any]]:
    """What Triton streams, to the end."""
    with sock.makefile("rb") as lines:
        found = []
        while not found or not found[-1]["finish_reason"]:
            line = lines.readline()
            assert line, found
            if line.startswith(b"data: "):
                found.append(json.loads(line[6:]))
    return found


def test_answers_hits_refusals_and_errors_are_counted(stack: Stack, settled: Samples) -> None:
    """What clients did is what the series say, each request once and with the right labels."""
    made = stack.cli("keys", "create", "--tenant", "acme", "--per-minute", "1", "--json")
    assert made.returncode == 0, made.stderr
    key = str(json.loads(made.stdout)["key"])
    prompt, m = "one two three", stack.model
    tokens, same = len(prompt.split()), seed()
    assert [complete(stack, prompt, seed=same) for _ in range(2)] == [200, 200]
    with contextlib.closing(stack.stream("two", max_tokens=5, seed=seed())) as stream:
        assert [*stream.events()][-1] == "[DONE]"
    assert complete(stack, "one", model="nothing") == 404
    assert [complete(stack, "three", key, seed=seed()) for _ in range(2)] == [200, 429]
    assert stack.request("GET", "/nothing")[0] == 404
    assert stack.request("POST", "/v2/repository/index", port="OPS")[0] == 401
    with contextlib.closing(stack.stream("one", max_tokens=1000, seed=seed())) as stream:
        next(stream.events())
    grown = after(stack, settled, "generations_total", m, "cancelled", rises_to=1)

    def rose(*series: str) -> float:
        return grown.get(series, 0.0)

    assert rose("generations_total", m, "ok") == 4 == rose("generation_duration_seconds_count", m)
    assert rose("generations_total", m, "refused") == 1 == rose("generations_total", "unknown", "refused")
    assert rose("requests_total", "openai", "generate", "ok") == 4
    assert rose("requests_total", "openai", "generate", "refused") == 2
    assert rose("errors_total", "not_found") >= 1 and rose("errors_total", "rate_limited") == 1
    assert rose("errors_total", "unauthenticated") == 1
    assert rose("cache_requests_total", "hit", "text_generation") == 1
    assert rose("tokens_total", "cached", m) == 4 and rose("tokens_total", "completion", m) >= 4 + 5 + 4
    assert rose("tokens_total", "prompt", m) == tokens + 1 + 1 + 1
    assert (
        rose("limit_decisions_total", "generate", "allowed")
        == 1
        == rose("limit_decisions_total", "generate", "refused")
    )
    assert rose("upstream_requests_total", m, "ok") == 3 and rose("upstream_requests_total", m, "cancelled") == 1
    # the cancelled one had its first token, too
    assert rose("time_to_first_token_seconds_count", m) == 4 == rose("queue_seconds_count", m)
    assert rose("time_per_output_token_seconds_count", m) == 3
    assert 0.015 < rose("time_per_output_token_seconds_sum", m) / 3 < 0.5  # a step of this model takes 20 ms
    assert rose("overhead_seconds_count", "generate") == 7 and rose("stage_seconds_count", "prepare") == 7
    now = scrape(stack)
    assert now["redis_up",] == now["triton_up",] == now["model_ready", m] == now["workers_ready",] == 1
    assert now["workers", "up"] == 1 and now["workers", "silent"] == now["workers", "down"] == 0
    assert now["breaker_state", m] == now["limit_degraded",] == now["audit_lost_total",] == 0 < now["audit_up",]
    assert now["memory_usage_bytes",] > 40 << 20 and now["cpu_seconds_total",] > 0


def test_the_time_in_the_queue_is_told_and_counted(stack: Stack, settled: Samples) -> None:
    """A stream that waits for a slot hears of its admission before its text, and the gateway counts how long it was."""
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as closing:
        for _ in range(4):
            closing.callback(raw_stream(stack).close)
        wait_until(lambda: stack.load()["running"] == 4, 5, "all slots are taken")
        waits = raw_stream(stack, max_tokens=2, return_num_input_tokens=True, return_finish_reason=True)
        began = time.monotonic()
        queued = pool.submit(complete, stack, "three", seed=seed())
        wait_until(lambda: stack.load()["waiting"] == 2, 5, "both wait")
        wait_until(lambda: scrape(stack).get(("model_requests", stack.model, "waiting")) == 2, 5, "the queue is seen")
        time.sleep(max(0.0, began + 0.6 - time.monotonic()))
    assert queued.result() == 200
    waited_at_most = time.monotonic() - began
    heard = events(waits)
    waits.close()
    inputs = [event["num_input_tokens"] for event in heard]
    told = next(place for place, count in enumerate(inputs) if count)
    assert told >= 2 and set(inputs[:told]) == {0} and set(inputs[told:]) == {1}
    assert [event["text_output"] for event in heard[: told + 1]] == [""] * (told + 1)
    assert "".join(event["text_output"] for event in heard[told + 1 :]) == "two three"
    grown = after(stack, settled, "queue_seconds_count", stack.model, rises_to=1)
    assert 0.5 < grown["queue_seconds_sum", stack.model] < waited_at_most
    assert grown["queue_seconds_sum", stack.model] < grown["time_to_first_token_seconds_sum", stack.model]


def test_a_stream_that_has_a_slot_hears_of_no_admission(stack: Stack) -> None:
    """On an idle model the first response has text, and with it the number of prompt tokens."""
    wait_until(lambda: stack.load()["running"] == 0, 10, "idle")
    sock = raw_stream(stack, max_tokens=2, return_num_input_tokens=True, return_finish_reason=True)
    heard = events(sock)
    sock.close()
    assert [(event["text_output"].strip(), event["num_input_tokens"]) for event in heard] == [("two", 1), ("three", 1)]
