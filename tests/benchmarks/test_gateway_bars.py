"""From rounds to verdicts: medians, differences within a round, and no figure where a run has failed."""

from __future__ import annotations

from typing import Any

from benchmarks.gateway_bars import GRPC_1, Bar, added, bars, medians, ratio
from benchmarks.gateway_measure import HIT_1, HIT_32, PLAIN, REQUEST_1, REQUEST_32


def figures(p50: float, per_s: float, **more: Any) -> dict[str, Any]:
    return {
        "errors": {},
        "p50_ms": p50,
        "p99_ms": p50 * 2,
        "first_p50_ms": p50,
        "per_s": per_s,
        "cpu_us": 100.0,
        **more,
    }


def rounds() -> list[dict[str, dict[str, dict[str, Any]]]]:
    """Three, of which the machine was twice as slow in the second."""
    found = []
    for slow in (1, 2, 1):
        names = {"direct": (0.1, 9000), "ours": (0.5, 3000), "litellm": (10.1, 100), "portkey": (1.1, 800)}
        one = {
            name: {run.name: figures(p50 * slow, per_s / slow) for run in PLAIN} for name, (p50, per_s) in names.items()
        }
        one["ours"] |= {HIT_1.name: figures(0.3 * slow, 3000), HIT_32.name: figures(4.0, 7000 / slow)}
        found.append(one)
    return found


def test_figures_are_compared_within_their_round() -> None:
    """A slow round moves neither a ratio nor an added time of the others; medians are over the rounds."""
    found = rounds()
    assert ratio(found, REQUEST_32.name, "per_s", "ours", "litellm") == 30
    assert added(found, "ours", "direct", REQUEST_1.name, "p50_ms") == 0.4
    middle = medians(found)["ours"][REQUEST_32.name]
    assert middle["per_s"] == 3000 and middle["rounds"]["per_s"] == [3000, 1500, 3000]


def test_bars_are_reached_or_missed_by_their_figures() -> None:
    """Every bar of the systems that ran is there, with the verdict that its figures give."""
    growth = {
        "points": [{"requests": 20_000, "pss": 50.0}, {"requests": 50_000, "pss": 60.0}], "mark": 0,
        "slope_mb_per_10000": 3.3,
    }  # fmt: skip
    judged = {(bar.bar, bar.what): bar.reached for bar in bars(rounds(), {"litellm": 400.0, "portkey": 100.0}, growth)}
    assert judged == {
        ("G1", "added p50"): True,
        ("G1", "requests/s at 32"): True,
        ("G1", "streams/s at 32"): True,
        ("G1", "cache hits/s at 32"): None,  # LiteLLM with a cache did not run
        ("G1", "memory"): True,
        ("G2", "added p50"): True,
        ("G2", "requests/s at 32"): True,
        ("G2", "streams/s at 32"): True,
        ("G2", "memory"): False,
        ("G5", "cache hit, p50"): True,
        ("G5", "cache hits/s of a worker"): True,
        ("G5", "memory after 20,000 requests"): True,
        ("G5", "growth from there to 50,000"): False,
    }


def test_a_run_that_failed_once_is_no_result() -> None:
    """One error in one of the rounds takes the run, and every bar that needs it, out of the result."""
    found = rounds()
    found[1]["ours"][REQUEST_32.name] = {"errors": {"the connection was cut": 1}}
    assert medians(found)["ours"][REQUEST_32.name] == {"errors": [{"the connection was cut": 1}]}
    judged = {(bar.bar, bar.what): bar.reached for bar in bars(found, {}, None)}
    assert judged["G1", "requests/s at 32"] is None and judged["G1", "streams/s at 32"] is True
    assert added(found, "ours", "direct", GRPC_1, "p50_ms") is None


def test_a_bar_holds_at_its_limit() -> None:
    """At most and at least include the limit itself."""
    assert Bar("G", "", 0.6, 0.6, True, "ms").reached and Bar("G", "", 2.5, 2.5, False, "×").reached
    assert not Bar("G", "", 0.61, 0.6, True, "ms").reached and not Bar("G", "", 2.4, 2.5, False, "×").reached
