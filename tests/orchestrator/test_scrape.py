"""How the workers' series become one page for Prometheus."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from orchestrator.metrics import Metrics, Snapshot
from orchestrator.metrics_table import TABLE
from orchestrator.scrape import RATE_S, STALE_S, Scrape, Totals, build_info, resident_bytes

from .test_metrics import RECORD, record

# Names that dashboards and alert rules of this ecosystem rely on.
PROMISED = """
truthgpt_generations_total truthgpt_generation_duration_seconds truthgpt_memory_usage_bytes truthgpt_error_rate
truthgpt_time_to_first_token_seconds truthgpt_time_per_output_token_seconds truthgpt_request_duration_seconds
truthgpt_queue_seconds truthgpt_overhead_seconds truthgpt_tokens_total truthgpt_upstream_requests_total
truthgpt_cache_requests_total truthgpt_limit_decisions_total truthgpt_limit_degraded truthgpt_breaker_state
truthgpt_redis_up truthgpt_model_ready truthgpt_errors_total
""".split()
FORBIDDEN = {"user", "user_id", "key", "caller", "tenant", "session", "request_id", "id", "path", "address"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def scrape_of(clock: Clock, expected: int = 2, own: Snapshot | None = None) -> Scrape:
    return Scrape(expected, lambda: own or {}, clock)


def said(snapshot: Snapshot) -> bytes:
    return json.dumps(snapshot).encode()


def counted(totals: Totals) -> Totals:
    """Counters and histograms, those of the parent's own aside."""
    return {
        name: values
        for name, values in totals.items()
        if TABLE[name].kind != "gauge" and name != "truthgpt_worker_restarts_total"
    }


def flat(totals: Totals) -> dict[tuple[object, ...], float]:
    """Every number by series, labels and bucket."""
    return {
        (name, labels, place): number
        for name, values in counted(totals).items()
        for labels, value in values.items()
        for place, number in enumerate(value if isinstance(value, list) else [value])
    }


# Sixteenths are exact in floating point, whatever the order in which they are added.
seconds = st.integers(0, 4000).map(lambda n: n / 16)
records = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["demo", "small", "nothing"]),
        "outcome": st.sampled_from(["ok", "error", "cancelled"]),
        "error": st.sampled_from([None, "internal", "rate_limited"]),
        "operation": st.sampled_from(["generate", "infer"]),
        "cache": st.sampled_from([None, "hit", "miss"]),
        "completion_tokens": st.sampled_from([0, 1, 2, 5]),
        "ttft_s": st.none() | seconds,
        "duration_s": seconds,
        "upstream_s": st.none(),
        "queue_s": st.none() | seconds,
    }
).map(lambda changes: record(**changes))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), records), max_size=30))
def test_the_workers_together_are_one(requests: list[tuple[int, Any]]) -> None:
    """However requests are spread over workers, the sums are what one process would have counted of them all."""
    served = {"demo", "small"}.__contains__
    workers, alone = [Metrics(served) for _ in range(4)], Metrics(served)
    scrape, only = scrape_of(Clock()), scrape_of(Clock())
    for number, one in requests:
        workers[number].record(one)
        alone.record(one)
    for number, worker in enumerate(workers):
        scrape.started(number, 0)
        scrape.heard(number, said(worker.snapshot()))
    only.started(0, 0)
    only.heard(0, said(alone.snapshot()))
    assert flat(scrape.totals()) == flat(only.totals())


steps = st.lists(
    st.one_of(
        st.tuples(st.just("request"), st.integers(0, 2), records),
        st.tuples(st.just("say"), st.integers(0, 2), st.none()),
        st.tuples(st.just("die"), st.integers(0, 2), st.none()),
        st.tuples(st.just("wait"), st.integers(0, 2), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=50)
@given(steps)
def test_no_total_goes_back(steps: list[tuple[str, int, Any]]) -> None:
    """However workers speak, fall silent, die and are replaced, no counter falls, and what was heard of counts."""
    clock = Clock()
    scrape, heard = scrape_of(clock, 3), 0
    before: dict[tuple[object, ...], float] = {}
    workers = [Metrics(lambda model: True) for _ in range(3)]
    unheard = [0, 0, 0]
    for number in range(3):
        scrape.started(number, 0)
    for what, number, one in steps:
        if what == "request":
            workers[number].record(one)
            unheard[number] += 1
        elif what == "say":
            scrape.heard(number, said(workers[number].snapshot()))
            heard, unheard[number] = heard + unheard[number], 0
        elif what == "die":
            scrape.ended(number)
            workers[number], unheard[number] = Metrics(lambda model: True), 0
            scrape.started(number, 0)
        else:
            clock.now += 2 * STALE_S
            scrape.tick()
        now = flat(scrape.totals())
        assert all(now.get(key, 0) >= value for key, value in before.items())
        assert sum(n for (name, *_), n in now.items() if name == "truthgpt_requests_total") == heard
        before = now


def test_gauges_become_one_by_their_rule(clock: Clock) -> None:
    """Requests in flight add up, the worst breaker and the least ready view of a model count."""
    scrape = scrape_of(clock)
    views = [(3.0, 0.0, 1.0), (4.0, 2.0, 0.0)]
    for number, (in_flight, breaker, ready) in enumerate(views):
        scrape.started(number, 0)
        scrape.heard(
            number,
            said({"truthgpt_in_flight": [[in_flight]], "truthgpt_breaker_state": [["m", breaker]],
                  "truthgpt_model_ready": [["m", ready]]}),
        )  # fmt: skip
    totals = scrape.totals()
    assert totals["truthgpt_in_flight"] == {(): 7}
    assert totals["truthgpt_breaker_state"] == {("m",): 2} and totals["truthgpt_model_ready"] == {("m",): 0}


def test_a_silent_worker_has_counters_and_no_gauges(clock: Clock) -> None:
    """What it has counted stays, what it said of now does not, and the states of the workers tell of it."""
    scrape = scrape_of(clock, 4)
    for number in range(3):
        scrape.started(number, 0)
        if number < 2:
            scrape.heard(number, said({"truthgpt_in_flight": [[1]], "truthgpt_errors_total": [["internal", 5]]}))
    clock.now += STALE_S - 0.1
    scrape.heard(0, said({"truthgpt_in_flight": [[1]], "truthgpt_errors_total": [["internal", 5]]}))
    clock.now += 0.2
    totals = scrape.totals()
    assert totals["truthgpt_in_flight"] == {(): 1} and totals["truthgpt_errors_total"] == {("internal",): 10}
    assert totals["truthgpt_workers"] == {("up",): 1, ("silent",): 1, ("down",): 2}
    scrape.ended(0)
    scrape.started(0, 0)
    totals = scrape.totals()
    assert "truthgpt_in_flight" not in totals and totals["truthgpt_errors_total"] == {("internal",): 10}
    assert totals["truthgpt_worker_restarts_total"] == {(): 1}


def test_the_error_rate_looks_back_five_minutes(clock: Clock) -> None:
    """Errors of the service among the requests of the window; what was before it, and refusals, do not count."""
    scrape = scrape_of(clock, 1)
    scrape.started(0, 0)

    def told(ok: int, error: int, refused: int) -> float:
        outcomes = {"ok": ok, "error": error, "refused": refused}
        rows = [["generate", "openai", outcome, count] for outcome, count in outcomes.items()]
        scrape.heard(0, said({"truthgpt_requests_total": rows}))  # type: ignore[dict-item]
        (rate,) = scrape.totals()["truthgpt_error_rate"].values()
        assert isinstance(rate, float)
        return rate

    scrape.tick()
    assert scrape.totals()["truthgpt_error_rate"] == {(): 0.0}
    assert told(50, 50, 0) == 0.5
    for _ in range(int(RATE_S) + 2):
        clock.now += 1
        scrape.tick()
    assert told(50, 50, 0) == 0.0
    assert told(140, 60, 100) == 10 / 200
    assert len(scrape._seen) <= RATE_S + 2


@pytest.mark.parametrize(
    "line",
    [b"", b"[]", b"nonsense", b'{"truthgpt_errors_total": 3}', b'{"truthgpt_errors_total": [[]]}', b"\xff",
     b'{"truthgpt_errors_total": [[["a"], 1]]}'],
)  # fmt: skip
def test_nonsense_keeps_what_was_known(clock: Clock, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A line that is no snapshot is logged and passed over."""
    scrape = scrape_of(clock)
    scrape.started(1, 0)
    scrape.heard(1, said({"truthgpt_errors_total": [["internal", 5]]}))
    scrape.heard(1, line)
    assert scrape.totals()["truthgpt_errors_total"] == {("internal",): 5}
    assert "no snapshot" in caplog.text or "worker 1" in caplog.text


def test_a_worker_of_another_version_is_understood_as_far_as_it_goes(clock: Clock) -> None:
    """Series, labels and buckets that this version does not have are left out; the others count."""
    scrape = scrape_of(clock)
    scrape.started(1, 0)
    scrape.heard(
        1,
        said({"truthgpt_new": [[1]], "truthgpt_errors_total": [["internal", "more", 5], ["internal", 5]],
              "truthgpt_queue_seconds": [["m", [1, 2, 3]], ["m", 4]]}),
    )  # fmt: skip
    totals = scrape.totals()
    assert totals["truthgpt_errors_total"] == {("internal",): 5} and totals["truthgpt_queue_seconds"] == {}
    scrape.text("")


def busy(clock: Clock) -> Scrape:
    """One worker that has answered something, and every reading."""
    metrics = Metrics({"demo"}.__contains__)
    for changes in ({}, {"cache": "hit"}, {"fallback": "text"}, {"outcome": "error", "error": "internal"}):
        metrics.record(record(**changes))
    metrics.upstream("demo", "ok")
    snapshot = metrics.snapshot()
    for series in TABLE.values():
        if series.name not in snapshot and series.kind != "histogram":
            snapshot[series.name] = [[*series.labels, 1.0]]
    scrape = scrape_of(clock, 1, {"truthgpt_build_info": [[*labels, 1.0] for labels in build_info()]})
    scrape.started(0, os.getpid())
    scrape.heard(0, said(snapshot))
    return scrape


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [("", "text/plain"), ("*/*", "text/plain"), ("application/openmetrics-text;version=1.0.0;q=0.9", "openmetrics"),
     ("application/openmetrics-text;version=x;escaping=\r\n", "openmetrics"), ("text/plain;version=9", "text/plain")],
)  # fmt: skip
def test_the_page_is_what_prometheus_reads(clock: Clock, accept: str, media_type: str) -> None:
    """Both formats parse, have every series of the table with its kind, help and labels, and the promised names."""
    text, kind = busy(clock).text(accept)
    assert media_type in kind and "\n" not in kind
    parser = parse_openmetrics if media_type == "openmetrics" else parse_text
    families: dict[str, Metric] = {family.name: family for family in parser(text.decode())}
    for series in TABLE.values():
        family = families[series.name.removesuffix("_total") if series.kind == "counter" else series.name]
        assert (family.type, family.documentation) == (series.kind, series.help)
        assert family.samples, series.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(series.labels)
    assert set(PROMISED) <= set(TABLE)


def test_buckets_are_cumulative_and_end_with_all(clock: Clock) -> None:
    """A histogram's buckets only grow, the one without bound has the count, and the sum is there."""
    families = {family.name: family for family in parse_text(busy(clock).text("")[0].decode())}
    for name in (name for name, series in TABLE.items() if series.kind == "histogram"):
        by_labels: dict[object, list[tuple[float, float]]] = {}
        for sample in families[name].samples:
            if sample.name.endswith("_bucket"):
                labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
                by_labels.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
        for buckets in by_labels.values():
            assert [bound for bound, _ in buckets] == [*TABLE[name].buckets, float("inf")]
            assert [count for _, count in buckets] == sorted(count for _, count in buckets)
            assert buckets[-1][1] >= 1
    samples = {s.name: s.value for s in families["truthgpt_queue_seconds"].samples if not s.name.endswith("_bucket")}
    assert samples == {"truthgpt_queue_seconds_count": 2, "truthgpt_queue_seconds_sum": 2 * (RECORD.queue_s or 0)}


def test_first_token_buckets_are_the_field_s_own() -> None:
    """OpenTelemetry's buckets for time to first token, so that dashboards of other servers fit."""
    assert TABLE["truthgpt_time_to_first_token_seconds"].buckets == (
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    )  # fmt: skip


def test_no_label_is_a_person_or_a_request() -> None:
    """The table has no label whose values clients choose."""
    assert {label for series in TABLE.values() for label in series.labels} & FORBIDDEN == set()


def test_promtool_finds_nothing_to_mend(clock: Clock) -> None:
    """Prometheus's own checker takes the page and has no advice on names, kinds and helps."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run([promtool, "check", "metrics"], input=busy(clock).text("")[0], capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_memory_is_read_of_any_process() -> None:
    """Resident bytes of a live process, 0 of one that is gone."""
    assert 1 << 20 < resident_bytes(os.getpid()) < 1 << 40
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert resident_bytes(ended.pid) == 0
