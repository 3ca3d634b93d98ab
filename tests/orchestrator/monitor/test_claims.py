"""Who tells of a deployment's alert: one of all replicas that live, whatever becomes of others. By a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from orchestrator.monitor.claims import ELSEWHERE, LATER, MINE, claim, renew
from orchestrator.store import Store, told_key
from tests.orchestrator.monitor.test_watcher import said, store_of
from tests.redis import RealRedis

LIFE_S = 600.0  # that a word counts: for the whole test
REPEAT_S = 14_400.0


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    with RealRedis() as server:
        async with store_of(server) as made:
            yield made


async def asks(store: Store, who: str, state: str, at: float = 0.0, repeats: int = 0) -> int:
    return await claim(store, "alert", state, who, at, REPEAT_S, repeats, LIFE_S)


async def dies(store: Store, who: str) -> None:
    """It has said nothing more for as long as its word counts."""
    assert await store.call("HSET", told_key("alert"), f"on:{who}", "1") == 0


async def test_one_of_all_that_live_tells(store: Store) -> None:
    """The first tells that it fires, the last that it is resolved, and asking again gets the same answer."""
    assert [await asks(store, who, "firing") for who in "abcab"] == [MINE, ELSEWHERE, ELSEWHERE, MINE, ELSEWHERE]
    assert [await asks(store, who, "resolved") for who in "aba"] == [LATER, LATER, LATER]
    assert [await asks(store, who, "resolved") for who in "cabc"] == [MINE, ELSEWHERE, ELSEWHERE, MINE]
    assert [await asks(store, who, "firing") for who in "bac"] == [MINE, ELSEWHERE, ELSEWHERE]


async def test_the_end_is_told_although_another_is_gone(store: Store) -> None:
    """Who told that it fires has died: a survivor waits for its word to be over, and then tells that it is resolved."""
    assert await asks(store, "dead", "firing") == MINE
    assert await asks(store, "alive", "firing") == ELSEWHERE
    assert await asks(store, "alive", "resolved") == LATER
    await dies(store, "dead")
    assert await asks(store, "alive", "resolved") == MINE


async def test_a_new_alert_is_told_although_another_is_gone(store: Store) -> None:
    """It was told as firing by one that has died and never told the end: the next time it fires is told again, once."""
    assert await asks(store, "dead", "firing") == MINE
    await dies(store, "dead")
    assert [await asks(store, who, "firing") for who in "abab"] == [MINE, ELSEWHERE, MINE, ELSEWHERE]


async def test_who_told_it_may_go_while_others_see_it_fire(store: Store) -> None:
    """Dead, or not seeing it fire any more: while somebody sees it fire it is not told as firing a second time."""
    assert await asks(store, "dead", "firing") == MINE
    assert await asks(store, "a", "firing") == ELSEWHERE
    await dies(store, "dead")
    assert await asks(store, "b", "firing") == ELSEWHERE
    assert await asks(store, "a", "resolved") == LATER
    assert await asks(store, "b", "resolved") == MINE
    assert [await asks(store, who, "firing") for who in "ab"] == [MINE, ELSEWHERE]
    assert await asks(store, "a", "resolved") == LATER  # what it sees flickers, and b sees it fire all the time
    assert await asks(store, "a", "firing") == ELSEWHERE


async def test_a_word_counts_for_its_time(store: Store) -> None:
    """By Redis's clock; renewed it counts again, and holds the end back."""
    assert [await asks(store, who, "firing") for who in "ab"] == [MINE, ELSEWHERE]
    now = (await store.call("TIME"))[0]
    assert LIFE_S - 60 < float(await store.call("HGET", told_key("alert"), "on:a")) - float(now) <= LIFE_S + 1
    await dies(store, "a")
    renew(store, "alert", "a", REPEAT_S, LIFE_S)
    await said(store, told_key("alert"), "on:a")
    assert await asks(store, "b", "resolved") == LATER
    assert await claim(store, "alert", "firing", "a", 0.0, REPEAT_S, 0, 0.05) == MINE  # it told it
    await asyncio.sleep(0.1)
    assert await asks(store, "b", "resolved") == MINE


async def test_one_repeats(store: Store) -> None:
    """Whoever asks first after the pause repeats it, and the one that told it need not be alive for that."""
    assert await asks(store, "dead", "firing") == MINE
    await dies(store, "dead")
    answers = [await asks(store, who, "firing", at=REPEAT_S, repeats=1) for who in "aba"]
    assert answers == [MINE, ELSEWHERE, MINE]


async def test_what_was_told_is_forgotten(store: Store) -> None:
    """The key ends by itself an hour after the alert would have been repeated, and renewing puts that off."""
    await asks(store, "a", "firing")
    assert REPEAT_S < await store.call("TTL", told_key("alert")) <= REPEAT_S + 3600
    await store.call("EXPIRE", told_key("alert"), 10)
    await dies(store, "a")
    renew(store, "alert", "a", REPEAT_S, LIFE_S)
    await said(store, told_key("alert"), "on:a")
    assert await store.call("TTL", told_key("alert")) > REPEAT_S


async def test_without_redis_each_tells() -> None:
    """A Redis that is away decides nothing."""
    away = Store("unix:///nowhere", 1.0)
    assert [await asks(away, who, state) for who in "ab" for state in ("firing", "resolved")] == [MINE] * 4
    renew(away, "alert", "a", REPEAT_S, LIFE_S)
