"""The circuit breaker: its states over time, what counts as a failure, and what workers tell each other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.breaker import CLOSED, HALF_OPEN, LONGEST_OPEN_S, OPEN, Breaker, Breakers
from orchestrator.errors import (
    BreakerOpen,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    Text,
    UpstreamError,
    UpstreamUnavailable,
)
from orchestrator.store import EVENTS, Store
from tests.redis import RealRedis

from .conftest import eventually, until


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breakers(clock: Clock, threshold: int = 3, open_s: float = 5.0) -> Breakers:
    return Breakers(threshold, open_s, clock=clock)


def ask(those: Breakers, error: BaseException | None = None, answered: bool = False) -> None:
    """One request that ends with this error, or well."""
    with suppress(type(error) if error else BreakerOpen), those.guard("m") as guard:
        if answered:
            guard.chunk(last=True)
        if error is not None:
            raise error


def test_it_opens_at_consecutive_failures_and_closes_after_a_good_try() -> None:
    """Three failures in a row open it; a success between starts the count anew; after its time one request may try."""
    clock = Clock()
    those = breakers(clock)
    for error in (UpstreamUnavailable(), UpstreamError(), None, UpstreamError(), UpstreamUnavailable()):
        ask(those, error)
    assert those.state("m") == CLOSED
    ask(those, UpstreamUnavailable())
    assert those.state("m") == OPEN
    with pytest.raises(BreakerOpen) as refused, those.guard("m"):
        pass
    assert refused.value.retry_after_s == 5.0
    clock.now += 5.0
    assert those.state("m") == HALF_OPEN
    with those.guard("m") as guard:
        with pytest.raises(BreakerOpen), those.guard("m"):
            pass
        guard.chunk(last=False)
        assert those.state("m") == CLOSED
        ask(those)
    assert those.state("m") == CLOSED


def test_a_failed_try_opens_it_for_longer() -> None:
    """Each failed try doubles the time, up to a minute; a success resets it."""
    clock = Clock()
    those = breakers(clock, threshold=1)
    waits = []
    for _ in range(6):
        ask(those, UpstreamUnavailable())
        with pytest.raises(BreakerOpen) as refused, those.guard("m"):
            pass
        waits.append(refused.value.retry_after_s)
        clock.now += waits[-1]
    assert waits == [5.0, 10.0, 20.0, 40.0, LONGEST_OPEN_S, LONGEST_OPEN_S]
    ask(those)
    ask(those, UpstreamUnavailable())
    clock.now += 5.0
    assert those.state("m") == HALF_OPEN


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest(Text("x", "y")), Overloaded(), OutOfMemory(), DeadlineExceeded(), Cancelled(),
        asyncio.CancelledError(), GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_says_nothing_of_the_model_counts_as_neither(error: BaseException) -> None:
    """A cancelled, refused or timed-out request neither counts towards opening nor clears the count."""
    those = breakers(Clock())
    ask(those, UpstreamUnavailable())
    ask(those, UpstreamUnavailable())
    for _ in range(10):
        ask(those, error)
    assert those.state("m") == CLOSED
    ask(those, UpstreamUnavailable())
    assert those.state("m") == OPEN


def test_a_cancelled_try_lets_the_next_one_try() -> None:
    """Half open, a caller who leaves does not keep the model out of reach for ever."""
    clock = Clock()
    those = breakers(clock, threshold=1)
    ask(those, UpstreamUnavailable())
    clock.now += 5.0
    ask(those, asyncio.CancelledError())
    assert those.state("m") == HALF_OPEN
    ask(those)
    assert those.state("m") == CLOSED


def test_an_older_request_that_leaves_lets_no_second_one_try() -> None:
    """Half open, one tries at a time, whatever becomes of those that were let in before it opened."""
    clock = Clock()
    those = breakers(clock, threshold=1)
    with pytest.raises(asyncio.CancelledError), those.guard("m"):
        ask(those, UpstreamUnavailable())
        clock.now += 5.0
        trying = those.guard("m")
        trying.__enter__()
        raise asyncio.CancelledError
    with pytest.raises(BreakerOpen), those.guard("m"):
        pass
    trying.__exit__(None, None, None)
    assert those.state("m") == CLOSED


def test_who_leaves_after_the_whole_answer_counts_as_a_success() -> None:
    """A caller that reads no further than the last chunk has seen the model answer."""
    those = breakers(Clock())
    ask(those, UpstreamUnavailable())
    ask(those, UpstreamUnavailable())
    ask(those, GeneratorExit(), answered=True)
    ask(those, UpstreamUnavailable())
    assert those.state("m") == CLOSED


def test_failing_in_mid_answer_opens_it() -> None:
    """A model that always breaks off after its first token is found out too."""
    clock = Clock()
    those = breakers(clock)
    for _ in range(3):
        with pytest.raises(UpstreamError), those.guard("m") as guard:
            guard.chunk(last=False)
            raise UpstreamError
    assert those.state("m") == OPEN


def test_models_are_apart_and_a_heartbeat_shortens_the_wait() -> None:
    """Another model's breaker stays closed; a model whose heartbeat is back may be tried at once."""
    those = breakers(Clock(), threshold=1)
    ask(those, UpstreamUnavailable())
    assert (those.state("m"), those.state("n")) == (OPEN, CLOSED)
    those.heard_again("m")
    assert those.state("m") == HALF_OPEN
    ask(those)
    assert those.states() == {"m": CLOSED}


@given(st.lists(st.sampled_from(["fail", "succeed", "leave", "alive", "pass", "half_open"]), max_size=60))
def test_the_machine_never_locks_a_model_out(steps: list[str]) -> None:
    """Whatever happens, after the longest wait and the probe's end a request may pass, and at most one probes."""
    breaker, now = Breaker(3, 5.0), 0.0
    for step in steps:
        if step == "pass":
            now += 7.0
        elif step in ("fail", "half_open"):
            getattr(breaker, step)(now)
        else:
            getattr(breaker, step)()
    now += LONGEST_OPEN_S
    breaker.leave()
    assert breaker.enter(now) == 0.0
    if breaker.state(now) == HALF_OPEN:
        assert breaker.enter(now) > 0.0


@asynccontextmanager
async def stores(server: RealRedis, count: int) -> AsyncIterator[list[Store]]:
    made = [Store(server.url, 0.5) for _ in range(count)]
    tasks = [asyncio.create_task(store.run()) for store in made]
    try:
        await until(lambda: all(store.up for store in made))
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_workers_tell_each_other() -> None:
    """What one worker finds out the others know at once; a reset reaches all; nonsense on the channel harms nobody."""
    with RealRedis() as server:
        async with stores(server, 2) as (first, second):
            one, other = Breakers(2, 30.0, first), Breakers(2, 30.0, second)
            store = first
            await eventually(lambda: _subscribed(store))
            ask(one, UpstreamUnavailable())
            ask(one, UpstreamUnavailable())
            await until(lambda: other.state("m") == OPEN)
            shown = json.loads(await first.call("HGET", "truthgpt:breakers", "m"))
            assert (shown["state"], shown["failures"]) == ("open", 2)
            for nonsense in (b"x", b"[]", b'{"event": "breaker", "model": "m", "worker": "w", "state": "open"}'):
                first.publish(EVENTS, nonsense)
            first.publish(EVENTS, b'{"event": "breaker_reset"}')
            await until(lambda: one.state("m") == other.state("m") == CLOSED)


async def _subscribed(store: Store) -> bool:
    return bool((await store.call("PUBSUB", "NUMSUB", EVENTS))[1] == 2)
