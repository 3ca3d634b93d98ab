"""Which candidates are the best: rules over figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ops.tune.choosing import finalists, frontier, reversions, verdicts, winner
from orchestrator.ops.tune.errors import CandidateError, TuneError
from orchestrator.ops.tune.figures import Bounds, Figures
from orchestrator.ops.tune.knobs import key

NOW = {"slots": "16", "threads": "0"}
POSITIVE = st.floats(0.01, 1000)


def figures(throughput: float, latency_s: float = 1.0) -> Figures:
    return Figures(throughput, latency_s, latency_s / 4, latency_s / 100)


def at(slots: int, threads: int = 0) -> dict[str, str]:
    return {"slots": str(slots), "threads": str(threads)}


@given(st.lists(st.tuples(POSITIVE, POSITIVE), max_size=20))
def test_the_frontier_is_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    """Each of the frontier is beaten by none in both figures, and whoever is not of it by one that is."""
    measured = [(at(number), figures(*pair)) for number, pair in enumerate(pairs)]
    best = frontier(measured)

    def beats(a: Figures, b: Figures) -> bool:
        return a.throughput >= b.throughput and a.latency_s <= b.latency_s

    for point, one in measured:
        others = [other for name, other in best if name != point]
        if (point, one) in best:
            assert not any(beats(other, one) for other in others)
        else:
            assert any(beats(other, one) for other in others)
    assert [one.throughput for _, one in best] == sorted((one.throughput for _, one in best), reverse=True)


def test_finalists_keep_the_bounds_and_promise_something() -> None:
    """The fastest that keeps the bounds, and the best with one change less; where it has but one, the next."""
    current = (NOW, figures(100))
    measured = [current, (at(64, 2), figures(140, 3)), (at(32, 2), figures(131)), (at(8), figures(129)),
                (at(32), figures(99)), (at(16, 2), figures(80)), (at(4), figures(101))]  # fmt: skip
    assert finalists(measured, current, Bounds(latency_s=1.1), 0.05) == [at(32, 2), at(32)]
    del measured[2]
    assert finalists(measured, current, Bounds(latency_s=1.1), 0.05) == [at(8)]
    assert finalists(measured[-1:], current, Bounds(latency_s=1.1), 0.05) == []
    assert finalists(measured, current, Bounds(latency_s=0.5), 0.05) == []


def test_where_what_is_set_breaks_the_bounds_a_slower_one_is_a_finalist() -> None:
    """It is what was asked for."""
    measured = [(NOW, figures(100, 2.0)), (at(4), figures(60, 0.5))]
    assert finalists(measured, measured[0], Bounds(latency_s=1.0), 0.05) == [at(4)]
    rounds = [{key(point): one for point, one in measured}] * 3
    (one,) = verdicts(rounds, NOW, None, Bounds(latency_s=1.0), 0.05)
    assert one.kept and one.better and one.ratio == 0.6


def test_a_change_that_gains_nothing_is_not_made() -> None:
    """The best is also tried without each of its changes, and of those that hardly differ the one with fewer wins."""
    assert reversions(at(32, 2), NOW) == [at(16, 2), at(32, 0)] and reversions(at(32), NOW) == []
    rounds = [{key(NOW): figures(100), key(at(32, 2)): figures(122), key(at(32)): figures(121)}] * 5
    best = winner(verdicts(rounds, NOW, 1.1, Bounds(), 0.05), NOW, 0.05)
    assert best is not None and best.point == at(32)


@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=9), st.floats(0.5, 2))
def test_a_machine_that_changes_its_speed_changes_no_verdict(speeds: list[float], ratio: float) -> None:
    """Throughput is compared within a round: whatever the machine does between rounds, the verdict is the ratio's."""
    rounds = [
        {key(NOW): figures(100 * speed, 1 / speed), key(at(32)): figures(100 * speed * ratio, 1 / speed)}
        for speed in speeds
    ]
    (one,) = verdicts(rounds, NOW, 1.1, Bounds(), 0.05)
    assert one.ratio == pytest.approx(ratio) and one.kept
    if abs(ratio - 1.05) > 1e-6:
        assert one.better is (ratio > 1.05)


def test_a_lucky_median_does_not_win() -> None:
    """The ratios of a real run of one that was no better: above the margin in the middle, below 1 in two of five."""
    rounds = [{key(NOW): figures(100), key(at(32)): figures(100 * r)} for r in (1.07, 0.94, 1.077, 0.99, 1.10)]
    (one,) = verdicts(rounds, NOW, 1.1, Bounds(), 0.05)
    assert one.ratio == pytest.approx(1.07) and one.kept and not one.better


def test_one_that_failed_in_a_round_or_breaks_a_bound_does_not_win() -> None:
    """However fast it is."""
    good = {key(NOW): figures(100), key(at(32)): figures(200)}
    (one,) = verdicts([good, {key(NOW): figures(100)}, good], NOW, 1.1, Bounds(), 0.05)
    assert one.ratio == 2 and not one.better
    late = {key(NOW): figures(100), key(at(32)): figures(200, 1.2)}
    (one,) = verdicts([late] * 3, NOW, 1.1, Bounds(), 0.05)
    assert not one.kept and winner([one], NOW, 0.05) is None
    (one,) = verdicts([late] * 3, NOW, None, Bounds(latency_s=1.2), 0.05)
    assert one.better


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "ttft:0", "ttft:-1", "ttft:nan", "ttft:inf", "ttft:4000",
                                  "p99:1", "ttft:1,ttft:2", "ttft:1,,itl:1", "ttft:1;itl:2"])  # fmt: skip
def test_what_is_no_bound_is_refused(text: str) -> None:
    """The message names what is wrong and what could be given."""
    with pytest.raises(TuneError, match="bound: ") as refused:
        Bounds.parse(text)
    assert "such as ttft:0.5" in refused.value.hint


def test_bounds_are_read_and_compared() -> None:
    """Each by its name, in seconds; what is not measured breaks none."""
    bounds = Bounds.parse(" ttft:0.5, itl:0.05,latency:5")
    assert bounds == Bounds(5, 0.5, 0.05) and str(bounds) == "latency 5 s, ttft 0.5 s, itl 0.05 s"
    assert bounds.violations(Figures(1, 10, 0.25)) == {"latency_s": 1.0, "ttft_s": -0.5}
    assert Bounds.around(figures(1, 2), 1.5).kept(figures(1, 3))
    assert not Bounds.around(figures(1, 2), 1.4).kept(figures(1, 3))


def test_figures_of_a_run() -> None:
    """Output tokens of a decoder, requests of an encoder; failed requests, or none at all, are a failed candidate."""
    run = {"errors": 0, "completed": 5, "requests_per_s": 2.0, "output_tokens_per_s": 8.0,
           "latency_s": {"p99": 1.0}, "ttft_s": {"p99": 0.5}, "itl_s": {"p99": None}}  # fmt: skip
    assert Figures.of(run, encodes=False) == Figures(8.0, 1.0, 0.5, None, 5, 2.0)
    assert Figures.of(run, encodes=True) == Figures(2.0, 1.0, None, None, 5, 2.0)
    for bad in ({"errors": 2}, {"latency_s": {"p99": None}}, {"output_tokens_per_s": 0.0}):
        with pytest.raises(CandidateError):
            Figures.of(run | bad, encodes=False)
    assert Figures(8, 1, 0.5, rate=2).scaled(2) == Figures(16, 0.5, 0.25, rate=4)
    assert Figures.from_json(Figures(8, 1, 0.5).to_json()) == Figures(8, 1, 0.5)
    with pytest.raises(ValueError, match="no number"):
        Figures.from_json({"throughput": float("nan"), "latency_s": 1})
