"""The figures of a run."""

from __future__ import annotations

import json
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench import figures
from orchestrator.bench.answers import Answer, Fault
from orchestrator.bench.figures import MAX_KINDS, Run, Sample, meets, percentile
from orchestrator.bench.plan import Goals

from .servers import load


def answered(first: float, *later: float, ended: float, asked: int = 64, counted: bool = True) -> Answer:
    answer = Answer(asked)
    for now in (first, *later):
        answer.piece(now)
    if counted:
        answer.count(1 + len(later), 10)
    answer.finish(ended, streams=True)
    return answer


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=2, max_size=200))
def test_percentiles_are_those_of_statistics(values: list[float]) -> None:
    """On the straight line between two values, as the inclusive method of Python and numpy's default have it."""
    ordered = sorted(values)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for share in (0.5, 0.9, 0.99):
        assert percentile(ordered, share) == pytest.approx(cuts[round(100 * share) - 1], rel=1e-9, abs=1e-9)
    assert percentile(ordered, 0.0) == ordered[0] and percentile(ordered, 1.0) == ordered[-1]
    assert percentile(ordered[:1], 0.99) == ordered[0]


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=50))
def test_a_sample_tells_mean_and_bounds(values: list[float]) -> None:
    """And its percentiles ascend between them."""
    sample = Sample()
    for value in values:
        sample.add(value)
    told = sample.to_json()
    assert told is not None
    assert told["min"] <= told["p50"] <= told["p90"] <= told["p99"] <= told["max"]
    assert told["mean"] == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert Sample().to_json() is None


def test_a_sample_stays_small_and_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more values than are kept every second one stays: the percentiles move little, the memory does not grow."""
    monkeypatch.setattr(figures, "MAX_VALUES", 1000)
    sample = Sample()
    for number in range(100_000):
        sample.add(number / 100_000)
    told = sample.to_json()
    assert told is not None and 400 <= len(sample.values) <= 1000
    assert told["p50"] == pytest.approx(0.5, abs=0.01) and told["p99"] == pytest.approx(0.99, abs=0.01)


def test_a_good_answer_in_figures() -> None:
    """Ten seconds of one run: the definitions, by hand."""
    run = Run(load(requests=2, output_tokens=64))
    run.took(answered(0.5, 0.7, 0.9, 0.9, ended=1.0), due=0.0)
    run.took(answered(10.25, ended=10.5), due=10.0)
    run.seconds, run.cpu_s = 10.0, 1.0
    told = run.to_json()
    assert told["completed"] == 2 and told["requests_per_s"] == 0.2 and told["output_tokens_per_s"] == 0.5
    assert told["ttft_s"]["min"] == 0.25 and told["ttft_s"]["max"] == 0.5 and told["latency_s"]["mean"] == 0.75
    assert list(run.itl.values) == pytest.approx([0.2, 0.1, 0.1])
    assert list(run.tpot.values) == pytest.approx([0.4 / 3])
    assert told["output_tokens_mean"] == 2.5 and told["prompt_tokens_mean"] == 10 and told["errors"] == 0
    assert told["client_cpu"] == 0.1 and told["client_cpu_us_per_request"] == 500_000
    assert told["tokens_counted_by"] == "server" and told["goodput_per_s"] is None


def test_latency_counts_from_when_a_request_was_due() -> None:
    """One that was sent two seconds late took two seconds more, to its first token as well."""
    run = Run(load())
    run.took(answered(3.0, 3.1, ended=3.2), due=1.0)
    assert list(run.ttft.values) == [2.0] and list(run.latency.values) == pytest.approx([2.2])


def test_an_encoder_has_no_tokens_between() -> None:
    """First token and latency are one, between tokens is null."""
    run, answer = Run(load()), Answer(0)
    answer.count(None, 12)
    answer.finish(1.5, streams=False)
    run.took(answer, due=1.0)
    told = run.to_json()
    assert told["itl_s"] is None and told["tpot_s"] is None and told["output_tokens"] == 0
    assert told["ttft_s"] == told["latency_s"] and told["tokens_counted_by"] == "server"


def test_one_answer_that_nobody_counted_says_so_for_all() -> None:
    """A report must not call a number of pieces the server's count."""
    run = Run(load())
    run.took(answered(1.0, 1.1, ended=1.2), due=0.0)
    run.took(answered(1.0, 1.1, ended=1.2, counted=False), due=0.0)
    assert run.to_json()["tokens_counted_by"] == "pieces"


def test_errors_are_counted_by_kind_and_in_no_latency() -> None:
    """With the first message of each; of kinds that a server invents there is an end."""
    run = Run(load())
    for number in range(3):
        run.failed(Fault("http_503", f"busy {number}"))
    run.failed(Fault("timeout", "late"))
    told = run.to_json()
    assert told["errors"] == 4 and told["completed"] == 0 and told["latency_s"] is None
    assert told["error_kinds"]["http_503"] == {"count": 3, "first": "busy 0"}
    for number in range(1000):
        run.failed(Fault(f"http_{number}", "x"))
    assert len(run.errors) <= MAX_KINDS + 1 and run.error_count == 1004
    assert json.dumps(run.to_json(), allow_nan=False)


def test_a_run_in_which_nothing_happened_is_told_as_well() -> None:
    """No division by zero, no NaN."""
    told = json.loads(json.dumps(Run(load()).to_json(), allow_nan=False))
    assert told["requests_per_s"] == 0 and told["client_cpu_us_per_request"] is None and told["ttft_s"] is None


@pytest.mark.parametrize(
    ("goals", "good"),
    [
        (Goals(), True), (Goals(ttft_s=0.5), True), (Goals(ttft_s=0.49), False), (Goals(itl_s=0.1), True),
        (Goals(itl_s=0.09), False), (Goals(latency_s=1.0), True), (Goals(0.5, 0.1, 0.9), False),
        (Goals(0.5, 0.1, 1.0), True), (Goals(ttft_s=0.0), False),
    ],
)  # fmt: skip
def test_what_meets_the_goals(goals: Goals, good: bool) -> None:
    """All of them, the bound itself included."""
    assert meets(goals, 0.5, 0.1, 1.0) is good
    assert meets(Goals(itl_s=0.0), 0.5, None, 1.0)  # one token has no time between tokens


def test_goodput_counts_the_requests_that_meet_the_goals() -> None:
    """Errors and slow ones do not count."""
    run = Run(load(goals=Goals(latency_s=1.0)))
    for ended in (0.5, 1.0, 1.5):
        run.took(answered(0.2, 0.3, ended=ended), due=0.0)
    run.failed(Fault("timeout", "late"))
    run.seconds = 2.0
    assert run.to_json()["goodput_per_s"] == 1.0
