"""The main figures: what a window counts, what quantiles say, and what nobody can tell."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.metrics import Metrics
from orchestrator.metrics_table import DURATION_S
from orchestrator.monitor.summary import TICK_S, WINDOW_S, Summary, quantile
from orchestrator.scrape import Scrape
from tests.orchestrator.test_metrics import record


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gateway:
    """A scrape of one worker whose requests the test makes up, and the summary of it."""

    def __init__(self, *parts: Any) -> None:
        self.clock = Clock()
        self.metrics = Metrics({"demo"}.__contains__)
        self.scrape = Scrape(1, dict, self.clock)
        self.scrape.started(1, 0)
        self.summary = Summary(self.scrape.totals, self.clock, lambda: 1_800_000_000.25)
        for part in parts:
            self.summary.add(part)

    def asked(self, count: int = 1, **changes: Any) -> None:
        for _ in range(count):
            self.metrics.record(record(**changes))
        self.scrape.heard(1, json.dumps(self.metrics.snapshot()).encode())

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.clock.now += TICK_S
            self.scrape.heard(1, json.dumps(self.metrics.snapshot()).encode())
            self.summary.tick()


def test_rates_are_those_of_the_window() -> None:
    """Requests, failures, tokens and the cache's hits count for five minutes, and not any longer."""
    gateway = Gateway()
    gateway.asked(8)
    gateway.asked(1, outcome="error", error="internal")
    gateway.asked(1, cache="hit")
    gateway.wait(100)
    found = gateway.summary.figures()
    assert (found["requests"], found["errors"], found["error_rate"]) == (10, 1, 0.1)
    assert found["window_s"] == 100 and found["requests_per_s"] == 0.1
    assert found["tokens_per_s"] == pytest.approx(9 * 5 / 100)
    assert found["cache"] == {"hits": 1, "misses": 9, "hit_rate": 0.1}
    assert found["time"] == "2027-01-15T08:00:00.250Z"
    gateway.wait(WINDOW_S)
    gateway.asked(2)
    found = gateway.summary.figures()
    assert found["requests"] == 2 and found["window_s"] == pytest.approx(WINDOW_S, abs=TICK_S)
    assert gateway.summary.figures(60.0)["window_s"] == pytest.approx(60, abs=TICK_S)
    assert gateway.summary.minute()["requests"] == 2


def test_quantiles_are_of_good_answers_and_null_without_any() -> None:
    """Latency is that of requests that ended well; without one it is unknown, and not zero."""
    gateway = Gateway()
    gateway.asked(1, outcome="error", error="internal", duration_s=500.0, ttft_s=None)
    assert gateway.summary.figures()["latency_s"] == {"p50": None, "p95": None, "p99": None}
    gateway.asked(100, duration_s=0.75, ttft_s=0.3)
    found = gateway.summary.figures()
    assert 0.5 < found["latency_s"]["p50"] <= 1.0 and 0.25 < found["ttft_s"]["p99"] <= 0.5


@given(
    st.lists(st.floats(0.0001, 1000.0), min_size=1, max_size=200),
    st.sampled_from([0.5, 0.95, 0.99]),
)
def test_a_quantile_is_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    """The interpolated quantile lies in the bucket that has the true one; beyond all buckets it is the last bound."""
    metrics = Metrics({"demo"}.__contains__)
    random.shuffle(values)
    for value in values:
        metrics.record(record(duration_s=value))
    (row,) = metrics.snapshot()["truthgpt_request_duration_seconds"]
    assert isinstance(row[-1], list)
    found = quantile(DURATION_S, row[-1][:-1], share)
    true = sorted(values)[max(0, -(-int(share * 100) * len(values) // 100) - 1)]
    index = next((i for i, bound in enumerate(DURATION_S) if true <= bound), len(DURATION_S))
    assert found is not None
    if index == len(DURATION_S):
        assert found == DURATION_S[-1]
    else:
        assert (DURATION_S[index - 1] if index else 0.0) - 1e-6 <= found <= DURATION_S[index] + 1e-6


def test_models_are_unknown_while_no_worker_says_anything() -> None:
    """A gateway whose workers are silent knows nothing of its models: null, not an empty list."""
    gateway = Gateway()
    gateway.metrics.readings |= {
        "truthgpt_model_ready": lambda: {("demo",): 1.0}, "truthgpt_breaker_state": lambda: {("demo",): 2.0},
        "truthgpt_model_requests": lambda: {("demo", "running"): 1.0, ("demo", "waiting"): 7.0},
        "truthgpt_triton_up": lambda: {(): 1.0},
    }  # fmt: skip
    gateway.asked()
    assert gateway.summary.figures()["models"] == [
        {"name": "demo", "ready": True, "breaker": "open", "fallback": None, "running": 1, "waiting": 7}
    ]
    gateway.clock.now += 60
    found = gateway.summary.figures()
    assert found["models"] is None and found["triton_up"] is None and found["workers"]["silent"] == 1


def test_what_others_know_is_added() -> None:
    """A part adds its figures by name, into an object that is there already as well; all of it is JSON."""
    gateway = Gateway(lambda: {"memory": {"used_bytes": 5}, "active_users": 3}, lambda: {"gpus": []})
    found = json.loads(json.dumps(gateway.summary.figures()))
    assert found["memory"]["used_bytes"] == 5 and "gateway_bytes" in found["memory"]
    assert found["active_users"] == 3 and found["gpus"] == []


def test_memory_does_not_grow_with_time() -> None:
    """A day of ticks leaves no more behind than a window of them."""
    gateway = Gateway()
    for _ in range(2000):
        gateway.clock.now += TICK_S
        gateway.summary.tick()
    assert len(gateway.summary._past) <= WINDOW_S / TICK_S + 2
