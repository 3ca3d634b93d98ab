"""A soak that proves nothing fails: too little was asked, or seen, or came out otherwise than its name says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from . import ending
from .engine import BOUNDS, Report, unseen
from .load import CACHED, LEFT, lacking
from .test_verdict import series
from .verdict import Bound, judge

KINDS = {"hit": CACHED, "hang-up": LEFT, "limited": {"429": 0.01, "ok": 0.01}}
GOOD = {
    ("hit", "ok hit"): 50, ("hit", "ok miss"): 50, ("hang-up", "hung up"): 25, ("hang-up", "ok miss"): 75,
    ("limited", "429"): 1, ("limited", "ok"): 20,
}  # fmt: skip
METRICS = """# HELP truthgpt_requests_total Requests that have ended.
truthgpt_requests_total{endpoint="generate",edge="openai",outcome="cancelled"} 3
truthgpt_requests_total{endpoint="generate",edge="kserve",outcome="cancelled"} 1.0
truthgpt_requests_total{endpoint="generate",edge="grpc",outcome="cancelled"} 2
truthgpt_requests_total{endpoint="generate",edge="grpc",outcome="ok"} 9
truthgpt_audit_lost_total 0
"""


def test_kinds_must_end_as_they_are_named() -> None:
    """Hits have to come from the cache half of the time, and what is limited has to be refused, and let in, once."""
    assert lacking(GOOD, KINDS) == []
    assert lacking({**GOOD, ("hit", "ok miss"): 51}, KINDS) == ["hit: 50 of 101 were 'ok hit'"]
    assert lacking({**GOOD, ("limited", "429"): 0}, KINDS) == ["limited: 0 of 20 were '429'"]
    assert lacking({**GOOD, ("hang-up", "hung up"): 0}, KINDS) == ["hang-up: 0 of 75 were 'hung up'"]
    assert lacking({}, KINDS) == [f"{kind} was never asked" for kind in KINDS]


def test_too_few_requests_are_a_problem() -> None:
    """Half of the rate that was asked for is enough, less is not."""
    report = Report(60, 100, 3000, {}, (), (), {}, {})
    assert report.problems == []
    assert replace(report, requests=2999).problems == ["50 requests a second, not 100, prove too little"]


def test_what_was_not_sampled_is_a_problem() -> None:
    """Both workers and the regions of shared memory must have been there to be looked at."""
    flat = judge(series(60, 100, 5, 0, 0, 1), BOUNDS["files"])
    seen = (("worker 1", "memory"), ("worker 2", "memory"), ("shm", "regions"), ("shm", "bytes"))
    figures = dict.fromkeys(seen, flat)
    assert unseen(figures) == []
    none = judge(series(60, 100, 0, 0, 0, 1), BOUNDS["regions"])
    assert unseen({**figures, ("shm", "regions"): none}) == ["shm regions was not seen"]
    del figures["worker 2", "memory"]
    assert unseen(figures) == ["worker 2 memory was not seen"]


@pytest.mark.parametrize("what", ["files", "threads", "regions", "keys"])
def test_slow_leaks_of_what_is_counted_are_found(what: str) -> None:
    """One in 60 of a worker's requests is found in eight seconds, where a bound of 10 passes it, and one in 5,000 in
    twenty minutes.
    """
    quick = series(40, 27, 20, 1 / 120, 0, 1)
    assert not judge(quick, BOUNDS[what]).flat and judge(quick, Bound(slope=10, rise=10)).flat
    assert not judge(series(1200, 150, 20, 1 / 5000, 0, 1), BOUNDS[what]).flat


def test_what_comes_and_goes_is_flat_and_its_leaks_are_found() -> None:
    """Sockets, with as many more or less as there are clients, and keys that expire with the rate's ups and downs."""
    for what, value, noise, leak in (("sockets", 30, 3, 1 / 1000), ("expiring", 300, 20, 1 / 200)):
        assert all(judge(series(60, 100, value, 0, noise, seed), BOUNDS[what]).flat for seed in range(50))
        assert not judge(series(1200, 150, value, leak, noise, 1), BOUNDS[what]).flat


def test_every_edge_has_recorded_hang_ups_and_no_event_was_lost() -> None:
    """A cancelled request at one edge is none at another, and a counter that is missing says nothing."""
    assert ending.of_metrics(METRICS) == []
    without = METRICS.replace('edge="kserve",outcome="cancelled"', 'edge="kserve",outcome="ok"')
    assert ending.of_metrics(without) == ["no request was recorded as cancelled at the kserve edge"]
    assert ending.of_metrics(METRICS.replace("lost_total 0", "lost_total 2")) == ["audit events were lost: 2.0"]
    assert ending.of_metrics(METRICS.replace("lost_total", "other")) == ["audit events were lost: None"]


def test_errors_in_a_log_are_seen() -> None:
    """Lines of the gateway's and of Triton's that say error, and no others."""
    lines = [
        '{"time":"1","level":"info","message":"an error"}\n', '{"time":"2","level":"error","message":"x"}\n',
        "I1122 10:00:00.1 server.cc:1] fine\n", "E1122 10:00:00.1 server.cc:1] not fine\n",
        'E1122 10:00:00.1 server.cc:241] "CudaDriverHelper has not been initialized."\n',
    ]  # fmt: skip
    assert list(ending.errors(lines)) == [lines[1].strip(), lines[3].strip()]
