"""Tests of orchestrator.api.ratelimit."""

from __future__ import annotations

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.errors import headers_of
from orchestrator.api.ratelimit import duration, limit_headers
from orchestrator.domain import Limits, Window
from orchestrator.errors import RateLimited
from orchestrator.limits_local import LocalLimits

WINDOWS = (
    Window("minute", 60, 1, 12.0),
    Window("hour", 1000, 900, 1800.5),
    Window("day", 10000, 901, 80000.0),
    Window("tokens_minute", 4000, 1000, 0.012),
    Window("tokens_day", 100000, 1000, 3723.0),
    Window("concurrency", 4, 4, 1.0),
)


def test_all_windows() -> None:
    """The policy names all windows but concurrency, RateLimit the nearest to exhaustion, x-ratelimit-* one per unit."""
    assert limit_headers(WINDOWS) == [
        (
            b"ratelimit-policy",
            b'"minute";q=60;w=60, "hour";q=1000;w=3600, "day";q=10000;w=86400, '
            b'"tokens-minute";q=4000;w=60, "tokens-day";q=100000;w=86400',
        ),
        (b"ratelimit", b'"hour";r=100;t=1801'),
        (b"x-ratelimit-limit-requests", b"1000"),
        (b"x-ratelimit-remaining-requests", b"100"),
        (b"x-ratelimit-reset-requests", b"30m1s"),
        (b"x-ratelimit-limit-tokens", b"4000"),
        (b"x-ratelimit-remaining-tokens", b"3000"),
        (b"x-ratelimit-reset-tokens", b"12ms"),
    ]


def test_units_apart() -> None:
    """Without token limits there is no token header, and without any window no header at all."""
    names = [name for name, _ in limit_headers(WINDOWS[:1])]
    assert names[:2] == [b"ratelimit-policy", b"ratelimit"]
    assert all(name.endswith(b"requests") for name in names[2:]) and len(names) == 5
    assert limit_headers(()) == limit_headers(WINDOWS[5:]) == []


def test_refused_window_is_shown() -> None:
    """A refusal's RateLimit tells of the window that refused, and has no t where that one has no header."""
    assert (b"ratelimit", b'"tokens-day";r=99000;t=3723') in limit_headers(WINDOWS, "tokens_day")
    assert (b"ratelimit", b'"hour";r=100') in limit_headers(WINDOWS, "concurrency")


def test_over_the_limit() -> None:
    """More used than allowed, as in shadow mode, shows nothing remaining rather than a negative number."""
    assert (b"ratelimit", b'"minute";r=0;t=3') in limit_headers([Window("minute", 5, 9, 2.5)])


def test_durations() -> None:
    """Durations have OpenAI's form at every magnitude."""
    written = {0: "0s", 0.012: "12ms", 1.5: "1.5s", 59.28: "59.28s", 59.9999: "1m0s", 360: "6m0s", 3723: "1h2m3s"}
    assert {seconds: duration(seconds) for seconds in written} == written


@given(st.floats(0, 200_000))
def test_a_duration_is_never_early(seconds: float) -> None:
    """A client that waits as long as was written has waited long enough, and not a second longer than needed."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?([\d.]+)s|(\d+)ms", duration(seconds))
    assert match is not None
    hours, minutes, rest, ms = (float(part or 0) for part in match.groups())
    assert seconds - 1e-6 <= hours * 3600 + minutes * 60 + rest + ms / 1000 < seconds + 1.001


@given(
    st.lists(st.tuples(st.floats(0, 40), st.integers(1, 60)), min_size=1, max_size=40),
    st.builds(
        Limits, per_minute=st.integers(0, 9), per_hour=st.integers(0, 20), tokens_per_minute=st.integers(0, 99),
        concurrency=st.integers(0, 9),
    ),
)  # fmt: skip
def test_retry_after_is_never_before_t(schedule: list[tuple[float, int]], limits: Limits) -> None:
    """On every refusal Retry-After is at least the t of RateLimit, whichever limits are near exhaustion."""
    local, now = LocalLimits(), 1e9
    for number, (later, tokens) in enumerate(schedule):
        now += later
        verdict = local.reserve("a", "infer", limits, tokens=tokens, lease=str(number), enforce=True, now=now)
        if verdict.refused is not None:
            error = RateLimited(verdict.refused.name, verdict.refused.limit, verdict.retry_after_s)
            after = int(dict(headers_of(error))[b"retry-after"])
            shown = dict(limit_headers(verdict.windows, verdict.refused.name)).get(b"ratelimit", b"")
            t = re.search(rb";t=(\d+)", shown)
            assert t is None or int(t[1]) <= after
            assert after == max(1, math.ceil(verdict.retry_after_s))
