"""Tests of orchestrator.limits on a real Redis and of orchestrator.limits_local, against an exact model."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest
import redis
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.domain import Limits, Window
from orchestrator.limits import (
    LEASE_S,
    LIMITS_LUA,
    MOST,
    PEEK,
    RENEW,
    SETTLE,
    Verdict,
    nothing_to_settle,
    peek_args,
    reserve_args,
    settle_args,
    verdict,
)
from orchestrator.limits_local import LocalLimits

from ..redis import RealRedis

START_MS = 1_700_000_000_123
LENGTH_MS = {"minute": 60_000, "hour": 3_600_000, "day": 86_400_000, "tokens_minute": 60_000, "tokens_day": 86_400_000}
names = count()


class Caller:
    """One caller at one endpoint, counted in Redis by the real scripts."""

    def __init__(self, client: redis.Redis, limits: Limits) -> None:
        self.client, self.limits = client, limits
        self.keys = [f"h{next(names)}", f"n{next(names)}"]

    def reserve(self, now_ms: int, tokens: int = 1, lease: str = "a", enforce: bool = True) -> Verdict:
        packed = reserve_args(self.limits, tokens=tokens, lease=lease, enforce=enforce, now_ms=now_ms)
        return verdict(self.client.evalsha(PEEK.sha, 2, *self.keys, packed), self.limits)

    def settle(self, reserved: Verdict, tokens: int, lease: str = "a") -> None:
        assert self.client.evalsha(SETTLE.sha, 2, *self.keys, *settle_args(reserved, tokens, lease)) == 1

    def peek(self, now_ms: int) -> dict[str, Window]:
        seen = verdict(self.client.evalsha(PEEK.sha, 2, *self.keys, *peek_args(self.limits, now_ms)), self.limits)
        return {window.name: window for window in seen.windows}

    def used(self, now_ms: int) -> dict[str, int]:
        return {name: window.used for name, window in self.peek(now_ms).items()}


@pytest.fixture(scope="module")
def client() -> Iterator[redis.Redis]:
    with RealRedis() as server, redis.Redis(unix_socket_path=str(server.path)) as connected:
        for script in (PEEK, SETTLE, RENEW):
            assert connected.script_load(script.text) == script.sha
        yield connected


@dataclass
class Exact:
    """What may be accepted, from a list of all that was: the statement that the scripts are held against."""

    limits: Limits
    last_ms: int | None = None
    offset_ms: int = 0
    counted: list[tuple[int, str, int]] = field(default_factory=list)  # the key's time, lease, tokens
    leases: dict[str, int] = field(default_factory=dict)

    def time(self, now_ms: int) -> int:
        """The key's time: a clock that is back by up to a minute stands still, beyond that it goes on from there."""
        if self.last_ms is None:
            return now_ms
        back_ms = self.last_ms - (now_ms + self.offset_ms)
        if back_ms > 60_000:
            self.offset_ms += back_ms
        return max(self.last_ms, now_ms + self.offset_ms)

    def used(self, name: str, time_ms: int, stretch: float = 1.0) -> int:
        """What was accepted in this window and at both of its ends."""
        since_ms = time_ms - LENGTH_MS[name] * stretch
        return sum(tokens if "tokens" in name else 1 for at, _, tokens in self.counted if since_ms <= at <= time_ms)

    def running(self, now_ms: int) -> int:
        return sum(now_ms < due <= now_ms + 90_000 for due in self.leases.values())

    def end_leases(self, now_ms: int) -> None:
        """What has been seen to be over does not begin again when the clock goes back, or forward again."""
        self.leases = {lease: due for lease, due in self.leases.items() if due > now_ms}
        if len(self.leases) >= self.limits.concurrency:
            self.leases = {lease: due for lease, due in self.leases.items() if due <= now_ms + 90_000}

    def check(self, now_ms: int, tokens: int, lease: str, said: Verdict) -> None:
        """Hold one verdict against the list."""
        time_ms = self.time(now_ms)
        self.end_leases(now_ms)
        if said.accepted:
            self.last_ms = time_ms
            self.counted.append((time_ms, lease, tokens))
            self.leases[lease] = now_ms + int(LEASE_S * 1000)
            for window in said.windows:
                if window.name in LENGTH_MS:
                    assert self.used(window.name, time_ms) <= window.used <= window.limit
                    assert window.used <= self.used(window.name, time_ms, 61 / 60)
                else:
                    assert self.running(now_ms) <= window.limit
            return
        assert said.refused is not None
        assert said.retry_after_s >= said.refused.reset_s
        if said.refused.name == "concurrency":
            assert self.running(now_ms) >= said.refused.limit
        else:
            cost = tokens if "tokens" in said.refused.name else 1
            assert self.used(said.refused.name, time_ms, 61 / 60) + cost > said.refused.limit

    def settle(self, lease: str, tokens: int) -> None:
        self.counted = [(at, name, tokens if name == lease else old) for at, name, old in self.counted]
        self.leases.pop(lease, None)


def fits(tokens: int, limits: Limits) -> bool:
    """Whether a request of so many tokens can ever pass."""
    return all(limit == 0 or tokens <= limit for limit in (limits.tokens_per_minute, limits.tokens_per_day))


STEPS_MS = st.one_of(
    st.integers(0, 1_500),
    st.integers(0, 90_000),
    st.integers(0, 4_000_000),
    st.integers(0, 100_000_000),
    # just a window's length, and just what may come too early
    st.builds(int.__add__, st.sampled_from((60_000, 61_000, 3_600_000, 3_660_000, 86_400_000)), st.integers(-1, 1)),
    st.integers(-70_000, 0),
    st.integers(-200_000_000, 0),
)
SMALL = st.integers(0, 6)
LIMITS = st.builds(
    Limits, per_minute=SMALL, per_hour=SMALL, per_day=st.integers(0, 12), tokens_per_minute=st.integers(0, 60),
    tokens_per_day=st.integers(0, 150), concurrency=st.integers(0, 3),
)  # fmt: skip
# clock's step, tokens reserved, which earlier request is settled first, and with how much of what it had reserved
SCHEDULE = st.lists(
    st.tuples(STEPS_MS, st.integers(0, 30), st.none() | st.integers(0, 50), st.floats(0, 1)), min_size=5, max_size=50
)


@settings(max_examples=80)
@example(Limits(concurrency=2), [(step, 0, None, 0.0) for step in (0, 0, 30_000, -1)])
@given(LIMITS, SCHEDULE)
def test_never_over_the_limit_and_never_refused_for_nothing(
    client: redis.Redis, limits: Limits, schedule: list[tuple[int, int, int | None, float]]
) -> None:
    """In every rolling window at most the limit is accepted, what is refused is over the limit in 61/60 of it, the
    same request passes after Retry-After and no millisecond sooner, and Redis and this process always agree."""
    caller, local, exact = Caller(client, limits), LocalLimits(), Exact(limits)
    open_requests: list[tuple[str, Verdict, int]] = []
    now_ms = START_MS
    for number, (step_ms, tokens, earlier, share) in enumerate(schedule):
        now_ms = max(now_ms + step_ms, 1)
        lease = str(number)
        if earlier is not None and open_requests:
            name, reserved, amount = open_requests.pop(earlier % len(open_requests))
            actual = int(amount * share)
            caller.settle(reserved, actual, name)
            local.settle("a", "infer", reserved, actual, name)
            exact.settle(name, actual)
        said = local.reserve("a", "infer", limits, tokens=tokens, lease=lease, enforce=True, now=now_ms / 1000)
        assert said == caller.reserve(now_ms, tokens, lease)
        exact.check(now_ms, tokens, lease, said)
        if said.accepted:
            open_requests.append((lease, said, tokens))
        elif said.refused is not None and said.refused.name != "concurrency" and fits(tokens, limits):
            for early_ms in (1, 0):
                then = now_ms / 1000 + said.retry_after_s - early_ms / 1000
                trial = copy.deepcopy(local)
                again = trial.reserve("a", "infer", limits, tokens=tokens, lease="x", enforce=True, now=then)
                if again.refused is None or again.refused.name != "concurrency":
                    assert again.accepted is (early_ms == 0)


T = START_MS - START_MS % 86_400_000  # the start of a day, so of every sub-bucket


def test_the_window_rolls(client: redis.Redis) -> None:
    """What was accepted counts for exactly 60 seconds at least and 61 at most, wherever it fell in its second."""
    for late_ms in (0, 1, 500, 999):
        caller = Caller(client, Limits(per_minute=60))
        assert all(caller.reserve(T + late_ms).accepted for _ in range(60))
        for later_ms in (0, 30_000, 60_000, 60_999 - late_ms):
            refused = caller.reserve(T + late_ms + later_ms)
            assert not refused.accepted and refused.retry_after_s == pytest.approx((61_000 - late_ms - later_ms) / 1000)
        assert caller.reserve(T + 61_000).accepted


def test_all_windows_or_none(client: redis.Redis) -> None:
    """A refusal by one window spends nothing of the others, takes no lease and makes no key."""
    caller = Caller(client, Limits(per_minute=5, per_hour=1, tokens_per_day=100, concurrency=5))
    assert caller.reserve(T, 10).accepted
    before = caller.used(T)
    assert before == {"minute": 1, "hour": 1, "tokens_day": 10, "concurrency": 1}
    refused = caller.reserve(T, 10, "b")
    assert refused.refused == Window("hour", 1, 1, 3660.0) and refused.retry_after_s == 3660.0
    assert caller.used(T) == before
    fresh = Caller(client, Limits(tokens_per_minute=5))
    assert not fresh.reserve(T, 6).accepted
    assert client.exists(*fresh.keys) == 0


def test_the_longest_refusal_is_named(client: redis.Redis) -> None:
    """Of several used-up windows the one that stays so longest is named, with its own time to wait."""
    caller = Caller(client, Limits(per_minute=1, per_day=1, concurrency=1))
    caller.reserve(T)
    refused = caller.reserve(T + 1000, lease="b")
    assert refused.refused is not None and refused.refused.name == "day"
    assert refused.retry_after_s == 61 * 1440 - 1
    assert [window.name for window in refused.windows] == ["minute", "day", "concurrency"]


def test_unlimited_costs_nothing(client: redis.Redis) -> None:
    """Without a limit nothing is stored; a limit of 0 among others has no window and no field."""
    free = Caller(client, Limits())
    assert free.reserve(T) == Verdict(True, (), None, 0.0, free.reserve(T).reservation)
    assert client.exists(*free.keys) == 0 and nothing_to_settle(free.limits)
    caller = Caller(client, Limits(per_hour=3))
    caller.reserve(T)
    assert sorted(client.hkeys(caller.keys[0])) == [b"c", b"h"] and nothing_to_settle(caller.limits)
    assert client.exists(caller.keys[1]) == 0
    for limits in (Limits(tokens_per_minute=1), Limits(tokens_per_day=1), Limits(concurrency=1)):
        assert not nothing_to_settle(limits)


def test_a_clock_that_goes_back(client: redis.Redis) -> None:
    """Back by seconds it is held, back by days (it had been ahead) the key goes on at its pace: nothing is forgotten,
    and nobody waits longer than a window."""
    caller = Caller(client, Limits(per_minute=2))
    caller.reserve(T), caller.reserve(T)
    held = caller.reserve(T - 40_000)
    assert not held.accepted and held.retry_after_s == 101.0
    ahead = Caller(client, Limits(per_minute=2, per_day=3))
    for _ in range(2):
        assert ahead.reserve(T + 30 * 86_400_000).accepted
    assert ahead.used(T) == {"minute": 2, "day": 2}
    refused = ahead.reserve(T)  # though refused, it has set the key's clock going
    assert not refused.accepted and refused.retry_after_s == 61.0
    assert not ahead.reserve(T + 60_999).accepted
    assert ahead.reserve(T + 61_000).accepted
    assert ahead.reserve(T + 122_000).refused == Window("day", 3, 3, 61 * 1440 - 122)
    assert ahead.reserve(T + 61 * 1_440_000).accepted


def test_settling(client: redis.Redis) -> None:
    """The true number takes the reserved one's place in its sub-bucket of both windows, and the lease is given back."""
    caller = Caller(client, Limits(tokens_per_minute=100, tokens_per_day=1000, concurrency=2))
    first = caller.reserve(T, 60, "a")
    second = caller.reserve(T + 10_000, 40, "b")
    assert caller.reserve(T + 10_000, 1, "c").refused == Window("tokens_minute", 100, 100, 51.0)
    caller.settle(first, 5, "a")
    assert caller.used(T + 20_000) == {"tokens_minute": 45, "tokens_day": 45, "concurrency": 1}
    caller.settle(second, 0, "b")  # cancelled before it used any
    assert caller.used(T + 20_000) == {"tokens_minute": 5, "tokens_day": 5, "concurrency": 0}
    assert caller.peek(T + 20_000)["tokens_minute"].reset_s == 41.0
    assert caller.used(T + 61_000)["tokens_minute"] == 0


def test_settling_late_or_twice(client: redis.Redis) -> None:
    """Settling what has left the window or was reset changes nothing, and no count goes below zero."""
    caller = Caller(client, Limits(tokens_per_minute=100))
    gone = caller.reserve(T, 50)
    caller.reserve(T + 61_000, 70)
    caller.settle(gone, 0)
    assert caller.used(T + 61_000) == {"tokens_minute": 70}
    again = caller.reserve(T + 61_000, 30)
    for _ in range(5):
        caller.settle(again, 0)
    assert caller.used(T + 61_000) == {"tokens_minute": 0}
    old = caller.reserve(T + 62_000, 90)
    client.delete(caller.keys[0])
    caller.settle(old, 0)
    assert client.exists(caller.keys[0]) == 0
    caller.reserve(T + 62_001, 80)
    caller.settle(old, 0)
    assert caller.used(T + 62_001) == {"tokens_minute": 80}


def test_more_tokens_than_the_limit(client: redis.Redis) -> None:
    """A request whose tokens alone exceed a limit is refused with that window and told to wait its length."""
    caller = Caller(client, Limits(tokens_per_minute=10))
    refused = caller.reserve(T, 11)
    assert refused.refused == Window("tokens_minute", 10, 0, 0.0) and refused.retry_after_s == 60.0
    caller.reserve(T, 10)
    assert caller.reserve(T, 11).retry_after_s == 61.0


def test_shadow(client: redis.Redis) -> None:
    """In shadow mode what is over the limit is counted and accepted, and the verdict tells of the refusal."""
    caller = Caller(client, Limits(per_minute=1, concurrency=1))
    assert caller.reserve(T, enforce=False).refused is None
    over = caller.reserve(T, lease="b", enforce=False)
    assert over.accepted and over.refused == Window("minute", 1, 2, 61.0) and over.retry_after_s == 61.0
    assert caller.used(T) == {"minute": 2, "concurrency": 2}
    caller.settle(over, 0, "b")
    assert caller.used(T)["concurrency"] == 1


def test_huge_numbers(client: redis.Redis) -> None:
    """Limits, reservations and counts saturate, exact to 10^12 tokens, in Redis as in this process."""
    limits = Limits(tokens_per_minute=10**30, tokens_per_day=MOST)
    caller, local = Caller(client, limits), LocalLimits()
    for number in range(400):
        lease, now_ms, tokens = str(number), T + number * 200, MOST - 1 if number == 0 else 10**20
        said = caller.reserve(now_ms, tokens, lease, enforce=number == 0)
        there = local.reserve("a", "infer", limits, tokens=tokens, lease=lease, enforce=number == 0, now=now_ms / 1000)
        assert said == there
        if number == 0:
            assert said.windows[0].used == MOST - 1
    assert 0 < said.windows[1].used <= 61 * 4 * MOST


def test_leases(client: redis.Redis) -> None:
    """A lease that nobody renews is given back after 30 s, a renewed one stays, one of a clock ahead does not block."""
    caller = Caller(client, Limits(concurrency=1))
    assert caller.reserve(T, lease="a").accepted
    full = caller.reserve(T + 29_999, lease="b")
    assert full.refused == Window("concurrency", 1, 1, 1.0) and full.retry_after_s == 1.0
    assert caller.reserve(T + 30_000, lease="b").accepted
    assert caller.reserve(T - 86_400_000, lease="c").accepted
    now_ms = int(time.time() * 1000)
    client.delete(caller.keys[1])
    assert caller.reserve(now_ms - 25_000, lease="d").accepted
    assert client.evalsha(RENEW.sha, 1, caller.keys[1], "d") == 1
    assert not caller.reserve(now_ms + 29_000, lease="e").accepted
    assert caller.reserve(now_ms + 40_000, lease="e").accepted


def test_redis_keeps_the_time(client: redis.Redis) -> None:
    """Without a time of the test's, Redis's clock counts, and idle keys expire after the longest window."""
    caller = Caller(client, Limits(per_minute=5, per_hour=5, concurrency=1))
    said = caller.reserve(-1)
    assert abs(said.reservation.time_ms / 1000 - time.time()) < 5
    assert 61 * 60 < client.pttl(caller.keys[0]) / 1000 <= 62 * 60
    assert 30 < client.pttl(caller.keys[1]) / 1000 <= 60


def test_memory_is_bounded(client: redis.Redis) -> None:
    """10,000 requests of one caller leave one hash, no bigger than its windows' sub-buckets."""
    caller = Caller(client, Limits(10**6, 10**6, 10**6, 10**9, 10**9))
    keys = client.dbsize()
    with client.pipeline(transaction=False) as pipe:
        for number in range(10_000):
            packed = reserve_args(caller.limits, tokens=1000, lease="a", enforce=True, now_ms=T + number * 17_000)
            pipe.evalsha(PEEK.sha, 2, *caller.keys, packed)
        pipe.execute()
    assert client.dbsize() == keys + 1
    assert sum(len(value) for value in client.hvals(caller.keys[0])) <= 5 * (12 + 61 * 6) + 18
    assert client.memory_usage(caller.keys[0]) < 4096


def test_joins_other_lua(client: redis.Redis) -> None:
    """LIMITS_LUA only defines locals: it names no key or argument of a script that it is part of, and no global."""
    assert "KEYS" not in LIMITS_LUA and "ARGV" not in LIMITS_LUA
    main = "local function other() return 7 end return {other(), #limits_reserve(KEYS[1], KEYS[2], ARGV[1])}"
    packed = reserve_args(Limits(per_minute=1), tokens=1, lease="a", enforce=True)
    assert client.eval(LIMITS_LUA + main, 2, "joined", "leases", packed) == [7, 8]


def test_local_memory_is_bounded() -> None:
    """This process keeps the callers that asked last; one who asks again is kept, one who was dropped starts anew."""
    local, limits = LocalLimits(max_subjects=3), Limits(per_minute=1, tokens_per_minute=9, concurrency=1)

    def ask(subject: str, endpoint: str = "infer") -> Verdict:
        return local.reserve(subject, endpoint, limits, tokens=1, lease=subject, enforce=True, now=1e9)

    first = ask("a")
    assert first.accepted and ask("b").accepted and ask("c").accepted
    assert not ask("a").accepted
    assert ask("d").accepted
    assert not ask("a").accepted and ask("b").accepted
    assert len(local._subjects) == 3
    local.settle("gone", "infer", first, 0, "a")
    local.settle("a", "infer", first, 0, "a")
    assert ask("a", "embed").accepted
    local.renew("a", "a", 1e9 + 29)
    later = local.reserve("a", "classify", limits, tokens=1, lease="b", enforce=True, now=1e9 + 35)
    assert later.refused is not None and later.refused.name == "concurrency"
