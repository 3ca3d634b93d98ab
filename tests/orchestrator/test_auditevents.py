"""What the audit log says of requests, incidents, minutes and floods."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.auditevents import Flood, Minute, Quantiles, of_incident, of_request
from orchestrator.auditlog import LINE_BYTES, Mark, chained
from orchestrator.domain import Record
from orchestrator.fingerprint import Fingerprint
from orchestrator.incident import Incident
from orchestrator.ops.auditread import COLUMNS

PRINTS = Fingerprint(b"k" * 32)
RECORD = Record(
    id="r1", caller="k2s7dhq3mzpa", tenant="acme", operation="generate", task="text_generation", model="demo",
    stream=True, outcome="ok", error=None, finish_reason="stop", prompt_tokens=3, completion_tokens=5,
    accepted=1_800_000_000.0, ttft_s=0.01, duration_s=0.25, traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
    edge="openai", route="POST /v1/completions", cache="miss", input_hash="c" * 32, output_chars=17,
)  # fmt: skip
INCIDENT = Incident(
    kind="unauthenticated", id="r2", edge="kserve", operation="/v2/models/{model}/infer", caller="",
    address="192.0.2.7", at=1_800_000_000.0,
)  # fmt: skip


def read(event: bytes) -> dict[str, Any]:
    return dict(json.loads(chained(event, Mark(), PRINTS)[0]))


def test_a_generation_says_all_that_an_auditor_asks() -> None:
    """The line of an answered request, word for word; its time is that of its end."""
    row = read(of_request(RECORD, PRINTS))
    assert {name: value for name, value in row.items() if name not in ("prev", "hash")} == {
        "seq": 1, "event": "generation", "time": "2027-01-15T08:00:00.250Z", "id": "r1", "tenant": "acme",
        "operation": "generate", "edge": "openai", "route": "POST /v1/completions", "model": "demo",
        "task": "text_generation", "stream": True, "outcome": "ok", "finish_reason": "stop", "cache": "miss",
        "input_hash": "c" * 32, "prompt_tokens": 3, "completion_tokens": 5, "output_chars": 17,
        "caller": PRINTS.caller("k2s7dhq3mzpa"), "duration_s": 0.25, "ttft_s": 0.01, "traceparent": RECORD.traceparent,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "event"),
    [("internal", "error"), ("unavailable", "error"), ("invalid_argument", "error"), ("rate_limited", "security"),
     ("unsafe_input", "security"), ("unauthenticated", "security"), ("permission_denied", "security")],
)  # fmt: skip
def test_what_failed_is_an_error_and_what_was_refused_for_who_asks_is_security(error: str, event: str) -> None:
    """A request is one event, by its outcome; a client that left is a generation that ended early."""
    assert read(of_request(replace(RECORD, outcome="error", error=error), PRINTS))["event"] == event
    assert read(of_request(replace(RECORD, outcome="cancelled"), PRINTS))["event"] == "generation"


def test_an_address_is_hashed_as_the_caller_without_a_key_is() -> None:
    """Who attacks with wrong keys and who asks without one can be found to be the same, and neither can be read."""
    event = of_incident(INCIDENT, PRINTS)
    assert read(event)["address"] == PRINTS.caller("ip-192.0.2.7") and b"192.0.2.7" not in event
    assert read(event)["event"] == "security" and "caller" not in read(event)


@given(st.text(max_size=256), st.text(max_size=128))
def test_no_client_can_make_a_line_that_is_not_one(model: str, id: str) -> None:
    """Whatever a client names itself or its model, a line is one line of printable ASCII of bounded length."""
    for event in (of_request(replace(RECORD, model=model, id=id), PRINTS),
                  of_incident(replace(INCIDENT, id=id * 100, detail=model * 100), PRINTS)):  # fmt: skip
        line, _ = chained(event, Mark(), PRINTS)
        assert line.endswith(b"\n") and len(line) <= LINE_BYTES
        assert line[:-1].decode("ascii").isprintable()


def test_a_key_given_as_a_request_id_is_masked() -> None:
    """A credential in a place that a client fills does not come into the log."""
    secret = "tg_abcdefghijkl_" + "s" * 43
    for event in (of_request(replace(RECORD, id=secret, model=secret), PRINTS),
                  of_incident(replace(INCIDENT, id=secret), PRINTS)):  # fmt: skip
        assert b"sss" not in event and b"tg_abcdefghijkl_" in event


def test_a_flood_is_bounded_by_kind_and_counted() -> None:
    """Of 10,000 wrong keys in a second a hundred are written, then five a second; other kinds are not affected."""
    now = [0.0]
    flood = Flood(burst=100, rate=5, clock=lambda: now[0])
    assert sum(flood.admits("unauthenticated") for _ in range(10_000)) == 100
    assert flood.admits("permission_denied")
    now[0] = 10.0
    assert sum(flood.admits("unauthenticated") for _ in range(1000)) == 50
    assert flood.over() == {"unauthenticated": 9900 + 950}
    now[0] = 1000.0
    assert sum(flood.admits("unauthenticated") for _ in range(1000)) == 100


def test_kinds_are_bounded_too() -> None:
    """However many kinds there are, only so many are told apart."""
    flood = Flood(burst=1, rate=0, kinds=3)
    assert [flood.admits(f"kind {number}") for number in range(6)] == [True] * 4 + [False] * 2
    assert flood.over() == {"other": 2}


@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=200))
def test_quantiles_are_within_two_percent(values: list[float]) -> None:
    """Each quantile is that of the sorted values by nearest rank, up to the width of a bucket and three digits."""
    quantiles = Quantiles()
    for value in values:
        quantiles.add(value)
    found = quantiles.at(0.5, 1.0)
    assert found is not None
    assert found["p50"] == pytest.approx(statistics.median_low(values), rel=0.02)
    assert found["p100"] == pytest.approx(max(values), rel=0.02)


def test_a_minute_counts_what_was_not_written_too() -> None:
    """Requests of a flood are in the figures; a minute without any has none."""
    minute = Minute(100.0)
    assert minute.figures(160.0, 0) == {}
    for outcome in ("ok", "ok", "cancelled", "error"):
        minute.add(replace(RECORD, outcome=outcome))
    assert minute.figures(160.0, 6) == {
        "seconds": 60.0, "requests": 10, "errors": 7, "cancelled": 1, "completion_tokens": 20, "tokens_per_s": 0.333,
        "duration_quantiles_s": constant(0.25), "ttft_quantiles_s": constant(0.01),
    }  # fmt: skip


def constant(value: float) -> object:
    """The quantiles of one value."""
    return dict.fromkeys(("p50", "p95", "p99"), pytest.approx(value, rel=0.01))


def test_every_field_has_a_column() -> None:
    """What an event may have is a column of the exported table."""
    full = replace(RECORD, outcome="error", error="internal", refused="minute", shadow="hour", fallback="text",
                   sanitized=("html",), degraded=True)  # fmt: skip
    incident = replace(INCIDENT, caller="k", subject="s", detail="d", traceparent=RECORD.traceparent)
    names = {name for event in (of_request(full, PRINTS), of_incident(incident, PRINTS)) for name in read(event)}
    minute = Minute(0.0)
    minute.add(full)
    assert names | set(minute.figures(1.0, 0)) <= set(COLUMNS)
