"""Limits and cache in one round trip, and what is decided without Redis."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.api.errors import headers_of
from orchestrator.api.notes import note_headers
from orchestrator.cache import Ticket
from orchestrator.domain import CachePolicy, Caller, Limits, Notes
from orchestrator.errors import InvalidRequest, LimitsUnavailable, RateLimited
from orchestrator.limiter import RENEW, Limiter
from orchestrator.store import Script, Store, leases_key
from tests.redis import RealRedis

from .conftest import eventually, until

TICKET = Ticket("k" * 64, "t", "m", "text_generation")
CALLER = Caller("key1", "t", limits=Limits(per_minute=3))


@asynccontextmanager
async def connected(server: RealRedis, timeout_s: float = 0.5) -> AsyncIterator[Store]:
    store = Store(server.url, timeout_s)
    task = asyncio.create_task(store.run())
    try:
        await until(lambda: store.up)
        yield store
    finally:
        if store.up:
            await store.call("FLUSHALL")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def enter(limiter: Limiter, caller: Caller = CALLER, tokens: int = 0, ticket: Ticket | None = None, n: int = 0):
    notes = Notes()
    return await limiter.enter(caller, "generate", tokens, f"lease{n}", ticket, notes), notes


async def test_one_round_trip_counts_and_looks_up(server: RealRedis) -> None:
    """One script call says how much is left and that nobody has this answer; a refusal looks nothing up."""
    async with connected(server) as store:
        limiter = Limiter(store, "enforce", "local", 1)
        before = (await store.call("INFO", "stats")).decode()
        entry, notes = await enter(limiter, ticket=TICKET)
        after = (await store.call("INFO", "stats")).decode()
        assert _processed(after) - _processed(before) <= 12, "the script's own calls and one EVAL"
        assert entry.lookup is not None
        assert entry.lookup.state == "lead"
        assert [(w.name, w.limit, w.used) for w in notes.windows] == [("minute", 3, 1)]
        for number in range(2):
            await enter(limiter, n=number)
        with pytest.raises(RateLimited) as refused:
            await enter(limiter, ticket=TICKET)
        assert (refused.value.window, refused.value.limit) == ("minute", 3)
        assert 0 < (refused.value.retry_after_s or 0) <= 61
        assert not limiter.degraded


def _processed(info: str) -> int:
    return int(next(line for line in info.splitlines() if line.startswith("total_commands_processed")).split(":")[1])


async def test_who_has_no_limits_and_no_cache_asks_nothing(server: RealRedis) -> None:
    """Neither limits nor a ticket: no round trip, and no headers."""
    async with connected(server) as store:
        entry, notes = await enter(Limiter(store, "enforce", "local", 1), Caller("x"))
        assert (entry.verdict, entry.lookup, notes.windows) == (None, None, ())
        off, _ = await enter(Limiter(store, "off", "local", 1))
        assert off.verdict is None


async def test_shadow_counts_and_refuses_nobody(server: RealRedis) -> None:
    """In shadow mode the fourth of three passes and its notes name the limit."""
    async with connected(server) as store:
        limiter = Limiter(store, "shadow", "local", 1)
        shadows = [(await enter(limiter, n=number))[1].shadow for number in range(4)]
        assert shadows == [None, None, None, "minute"]


async def test_tokens_are_settled_and_places_given_back(server: RealRedis) -> None:
    """What was reserved is replaced by what was used, also when nothing was; the place is free again."""
    caller = replace(CALLER, limits=Limits(tokens_per_minute=100, concurrency=1))
    async with connected(server) as store:
        limiter = Limiter(store, "enforce", "local", 1)
        entry, _ = await enter(limiter, caller, tokens=90)
        with pytest.raises(RateLimited):
            await enter(limiter, caller, tokens=5, n=1)
        limiter.leave(entry, 20)

        async def left() -> bool:
            return not await store.call("ZCARD", leases_key("t", "key1"))

        await eventually(left)
        again, notes = await enter(limiter, caller, tokens=80, n=2)
        assert [(w.name, w.used) for w in notes.windows] == [("tokens_minute", 100), ("concurrency", 1)]
        limiter.leave(again, 0)
        await eventually(left)


async def test_a_place_that_was_given_back_is_not_renewed(server: RealRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewing takes a round trip for each caller; who leaves while another's is under way is free at once."""
    monkeypatch.setattr("orchestrator.limiter.RENEW_S", 0.05)
    async with connected(server) as store:
        limiter, run_script, renewing = Limiter(store, "enforce", "local", 1), store.run_script, asyncio.Event()

        async def slow(script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
            reply = await run_script(script, keys, args)
            if script is RENEW:
                renewing.set()
                await asyncio.sleep(0.1)
            return reply

        monkeypatch.setattr(store, "run_script", slow)
        callers = [replace(CALLER, id=id, limits=Limits(concurrency=1)) for id in ("first", "second")]
        _, (entry, _) = [await enter(limiter, caller, n=n) for n, caller in enumerate(callers)]
        running = asyncio.create_task(limiter.run())
        await renewing.wait()
        limiter.leave(entry, 0)
        await asyncio.sleep(0.15)
        assert not await store.call("ZCARD", leases_key(callers[1].tenant, "second"))
        running.cancel()


async def test_a_caller_who_leaves_while_it_is_counted_holds_no_place(server: RealRedis) -> None:
    """Cancelled in the middle of the round trip, a request gives back what it had reserved, and its flight's lock."""
    caller = replace(CALLER, limits=Limits(tokens_per_minute=100, concurrency=1))
    async with connected(server) as store:
        limiter = Limiter(store, "enforce", "local", 1)
        task = asyncio.create_task(enter(limiter, caller, tokens=100, ticket=TICKET))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        async def free() -> bool:
            try:
                entry, _ = await enter(limiter, caller, tokens=100, n=9)
            except RateLimited:
                return False
            limiter.leave(entry, 0)
            return True

        await eventually(free)
        assert not await store.call("EXISTS", TICKET.keys()[1])


@pytest.mark.parametrize("loss", ["fail_open", "fail_closed", "local"])
async def test_without_redis(loss: str) -> None:
    """A stalled Redis: all pass, none do, or this process's share counts; it is said until Redis is back."""
    with RealRedis() as server:
        async with connected(server, timeout_s=0.05) as store:
            limiter = Limiter(store, "enforce", loss, 2)
            await enter(limiter)
            server.stop_answering()
            if loss == "fail_closed":
                with pytest.raises(LimitsUnavailable):
                    await enter(limiter)
            else:
                passed = [await _passes(limiter) for _ in range(4)]
                # three a minute over two workers are two for each
                assert passed == ([True] * 4 if loss == "fail_open" else [True, True, False, False])
            assert limiter.degraded
            lookup = (await enter(limiter, Caller("y"), ticket=TICKET))[0].lookup
            assert lookup is not None
            assert lookup.state == "local"
            server.go_on()
            await until(lambda: store.up)
            await enter(limiter)
            assert not limiter.degraded


async def _passes(limiter: Limiter) -> bool:
    try:
        await enter(limiter)
    except RateLimited:
        return False
    return True


async def test_no_redis_at_all_counts_in_this_process() -> None:
    """A gateway that was given no Redis keeps its limits by itself, whatever redis_loss says."""
    limiter = Limiter(None, "enforce", "fail_open", 1)
    assert [await _passes(limiter) for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("limits", [Limits(concurrency=1, per_day=5), Limits(per_minute=1, tokens_per_day=100)])
async def test_a_refusal_never_says_to_come_back_too_early(server: RealRedis, limits: Limits) -> None:
    """Retry-After is not earlier than the t of RateLimit, whichever limit refuses."""
    caller = replace(CALLER, id="key2", limits=limits)
    async with connected(server) as store:
        limiter = Limiter(store, "enforce", "local", 1)
        await enter(limiter, caller, tokens=10)
        notes = Notes()
        with pytest.raises(RateLimited) as refused:
            await limiter.enter(caller, "generate", 10, "other", None, notes)
        headers = dict(note_headers(notes))
        t = re.search(rb";t=(\d+)", headers.get(b"ratelimit", b""))
        assert int(dict(headers_of(refused.value))[b"retry-after"]) >= (int(t[1]) if t else 0)
        assert notes.refused in ("concurrency", "minute")


async def test_a_request_larger_than_its_limit_is_told_so(server: RealRedis) -> None:
    """What can never pass is a wrong request that names its size and the limit, not one to be sent again."""
    caller = replace(CALLER, id="key3", limits=Limits(tokens_per_minute=100))
    async with connected(server) as store:
        limiter = Limiter(store, "enforce", "local", 1)
        with pytest.raises(InvalidRequest, match=r"101 tokens.* 100") as refused:
            await enter(limiter, caller, tokens=101)
        assert refused.value.param == "max_tokens"
        await enter(limiter, caller, tokens=100)


async def test_shadow_mode_refuses_nobody_without_redis_either() -> None:
    """fail_closed is for limits that are enforced."""
    with RealRedis() as server:
        async with connected(server, timeout_s=0.05) as store:
            server.stop_answering()
            limiter = Limiter(store, "shadow", "fail_closed", 1)
            assert [await _passes(limiter) for _ in range(5)] == [True] * 5
            no_store = replace(TICKET, policy=CachePolicy(store=False))
            entry, _ = await enter(limiter, ticket=no_store)
            assert entry.lookup is not None
            assert entry.lookup.state == "bypass", "what may not be stored is not shared either"
            server.go_on()
