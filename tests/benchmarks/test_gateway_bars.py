"""From rounds to verdicts: medians, differences within a round, and no figure where a run has failed."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from benchmarks import gateway, gateway_measure
from benchmarks.gateway_bars import GRPC_1, Bar, added, bars, medians, ratio
from benchmarks.gateway_load import Result
from benchmarks.gateway_measure import HIT_1, HIT_32, PLAIN, QUICK, REQUEST_1, REQUEST_32
from benchmarks.gateway_systems import Process, System


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


def test_strays_in_one_round_alone_have_a_median() -> None:
    """How many answers did not come from the cache is written down of every run, none included."""
    found = rounds()
    for one, strays in zip(found, (0, 3, 0), strict=True):
        result = Result(32, 9000, 1.0, {}, {"p50": 4.0}, {}, 0.0, strays, 20.0)
        one["ours"][HIT_32.name] = gateway_measure.kept(result)
    assert medians(found)["ours"][HIT_32.name]["strays"] == 0


async def test_memory_of_ours_is_measured_while_no_other_of_ours_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other gateways of ours, whose pages would count half, have ended by then; peers are let be. Without such a
    measurement there is no verdict.
    """

    def system(name: str) -> System:
        async def verify() -> str | None:
            return None

        return System(name, 0, Process(name, subprocess.Popen(["sleep", "60"]), tmp_path / "log"), verify)

    async def running(*_: object) -> dict[str, Any]:
        return {one.name: one.process.popen.poll() is None for one in [*everyone, fresh] if one.process is not None}

    everyone, fresh = [system("ours"), system("litellm"), system("ours-triton")], system("ours-memory")
    monkeypatch.setattr(gateway_measure, "growth", running)
    with Progress(disable=True) as progress:
        progress.add_task("memory")
        bench = gateway.Bench(tmp_path, ("ours",), QUICK, progress)
        bench.systems, bench._fresh = [(one, PLAIN) for one in everyone], lambda name: fresh
        async with contextlib.AsyncExitStack() as ends:
            for one in everyone:
                assert one.process is not None
                ends.callback(one.process.stop)
            seen = await bench.growth(ends, 2, 1, 1)
    assert seen == {"ours": False, "litellm": True, "ours-triton": False, "ours-memory": True}
    judged = {(bar.bar, bar.what): bar.reached for bar in bars(rounds(), {"ours": 1.0, "litellm": 400.0}, None)}
    assert judged["G1", "memory"] is None
