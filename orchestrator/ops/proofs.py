"""Proofs that a policy works, by using it: the gateway's own code on the deployment's Redis, under names of its own,
and on its Triton servers, which are asked for heartbeats alone.

Each leaves nothing behind and touches nobody's entries: its tenant exists for that one proof. All raise NotProven.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress

from orchestrator.breaker import CLOSED, OPEN, Breaker, Breakers
from orchestrator.cache import Lookup, Ticket
from orchestrator.domain import Caller, Chunk, Limits, Notes
from orchestrator.errors import BreakerOpen, RateLimited, TruthGPTError, UnsafeInput, UpstreamUnavailable
from orchestrator.fleet import Fleet, Member, Times, Visit
from orchestrator.flights import Flights
from orchestrator.limiter import Limiter
from orchestrator.resolving import Resolver, entries
from orchestrator.sanitize import Rules, check
from orchestrator.settings import Settings
from orchestrator.store import Store, StoreAway, StoreError, leases_key, limits_key
from orchestrator.triton import Deadlines, Repository, Triton

logging.getLogger("orchestrator").addHandler(logging.NullHandler())  # what is tripped on purpose is nothing to tell

TIMEOUT_S = 5.0
BALANCING_S = 8.0
REST_S = 0.3  # of the server that is ejected for the proof
SHARE = 3  # heartbeats that each server has to get
LOOK_S = 0.02
CALL_S = 2.0  # patience that a request would not have: this is about whether it works
ANSWER = "Hola. This is no model's answer."
HOSTILE = "Hola <script>alert(1)</script>"


class NotProven(Exception):
    """It does not do what it is for; the message says what was seen."""


def cache(url: str, settings: Settings) -> str:
    """An answer is made once, stored and found again, by the path that requests take."""

    async def prove(store: Store) -> str:
        caller = _somebody(Limits())
        ticket = Ticket(secrets.token_hex(32), caller.tenant, "doctor", "text_generation")
        limiter = Limiter(store, "off", settings.redis_loss, 1)
        flights = Flights(store, lambda task: 60, settings.cache_entry_bytes)

        async def look() -> Lookup:
            entry = await limiter.enter(caller, "generate", 0, secrets.token_hex(8), ticket, Notes())
            if entry.lookup is None:
                raise NotProven("the cache was not asked")
            return entry.lookup

        async def answer(outcome: object, put: Callable[[Chunk], object]) -> None:
            put(Chunk(ANSWER, 8, 1, "stop"))

        try:
            first = await look()
            if first.state != "lead":
                raise NotProven(f"a new question was a {first.state}")
            async for _ in flights.join(ticket, first, answer):
                pass
            await flights.idle()
            second = await look()
            if second.state != "hit" or second.answer is None or second.answer.text != ANSWER:
                raise NotProven(f"an answer that had been stored was a {second.state}")
        finally:
            await store.call("UNLINK", *ticket.keys())
        return "an answer was stored and found again"

    return _with(url, prove)


def limits(url: str, settings: Settings) -> str:
    """A caller who may ask once a minute is let in once, and refused the second time with the time to wait."""

    async def prove(store: Store) -> str:
        caller = _somebody(Limits(per_minute=1))
        limiter = Limiter(store, "enforce", "fail_closed", 1)
        try:
            await limiter.enter(caller, "generate", 0, secrets.token_hex(8), None, Notes())
            try:
                await limiter.enter(caller, "generate", 0, secrets.token_hex(8), None, Notes())
            except RateLimited:
                return "a second request in a minute was refused"
            raise NotProven("a caller was let in beyond the limit")
        finally:
            await store.call("UNLINK", limits_key(caller.tenant, caller.id, "generate"),
                             leases_key(caller.tenant, caller.id))  # fmt: skip

    return _with(url, prove)


def breaker(settings: Settings) -> str:
    """A breaker opens after as many failures as are set, refuses, and is closed by a reset."""
    model, those = "doctor", Breakers(settings.breaker_failures, settings.breaker_open_s)
    for _ in range(settings.breaker_failures):
        try:
            with those.guard(model):
                raise UpstreamUnavailable
        except UpstreamUnavailable:
            continue
    try:
        with those.guard(model):
            raise NotProven(f"it let a request through after {settings.breaker_failures} failures")
    except BreakerOpen:
        if those.state(model) != OPEN:
            raise NotProven(f"it refuses and is {those.state(model)}") from None
    those.change(model, Breaker.succeed)
    if those.state(model) != CLOSED:
        raise NotProven("it did not close")
    return f"a scratch breaker opened at {settings.breaker_failures} failures and was reset"


def balancing(urls: Sequence[str], settings: Settings) -> str:
    """Heartbeats are shared by these servers; with one ejected the others get them all; and it comes back."""

    async def prove(fleet: Fleet) -> str:
        model = await _served_by_all(fleet)
        everyone = set(fleet.members)
        shares = await _beats(fleet, model, settings, SHARE * len(everyone))
        if set(shares.values()) != {SHARE} or shares.keys() != everyone:
            raise NotProven(f"of {SHARE * len(everyone)} heartbeats at once the servers got {list(shares.values())}")
        with suppress(UpstreamUnavailable), fleet.attend(model) as visit:
            raise UpstreamUnavailable("it is ejected for a proof", server=True)
        out = visit.member
        if out in await _beats(fleet, model, settings, SHARE * len(everyone)):
            raise NotProven(f"{out.url} was ejected and asked all the same")
        while True:
            if out in await _beats(fleet, model, settings, len(everyone)):
                return f"{len(everyone)} servers share the heartbeats of {model}; one was ejected and came back"
            await asyncio.sleep(LOOK_S)

    async def run() -> str:
        times = Times(interval_s=REST_S / 3, engine_stall_s=settings.engine_stall_s, eject_s=REST_S)
        deadlines = Deadlines(connect_s=settings.connect_s, heartbeat_s=settings.heartbeat_timeout_s)
        fleet = Fleet(Resolver(entries(",".join(urls))), lambda url: Triton(url, deadlines), times, "off")
        watching = asyncio.create_task(fleet.run())
        try:
            async with asyncio.timeout(BALANCING_S):
                return await prove(fleet)
        except TimeoutError as error:
            away = [f"{state.url} is {state.state}" for state in fleet.states() if state.state != "ready"]
            raise NotProven("; ".join(away) or f"it took more than {BALANCING_S:g} s") from error
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await fleet.close()

    try:
        return asyncio.run(run())
    except TruthGPTError as error:
        raise NotProven(f"a heartbeat failed: {error}") from error


async def _served_by_all(fleet: Fleet) -> str:
    """A model that every server has ready, as soon as there is one."""
    while True:
        for served in fleet.served():
            if all(member.takes(served.model.name) for member in fleet.members):
                return served.model.name
        await asyncio.sleep(LOOK_S)


async def _beats(fleet: Fleet, model: str, settings: Settings, count: int) -> dict[Member, int]:
    """Send so many heartbeats at once; how many each server has answered."""
    with ExitStack() as stack:
        visits: list[Visit] = [stack.enter_context(fleet.attend(model)) for _ in range(count)]
        await asyncio.gather(*(Repository(v.triton).beat(model, settings.engine_stall_s) for v in visits))
    members = [visit.member for visit in visits]
    return {member: members.count(member) for member in set(members)}


def sanitizer(settings: Settings) -> str:
    """Dangerous text is refused or removed, as is set."""
    if settings.sanitize == "off":
        return "prompts are not looked at"
    try:
        cleaned = check([HOSTILE], Rules(settings.sanitize, settings.max_input_chars), "prompt")
    except UnsafeInput as error:
        if settings.sanitize != "reject":
            raise NotProven(f"a prompt was refused instead of cleaned: {error}") from error
        return "a prompt with <script> was refused"
    if settings.sanitize == "reject" or "<script" in cleaned.texts[0]:
        raise NotProven("a prompt with <script> went through")
    return "<script> was removed from a prompt"


def _somebody(those: Limits) -> Caller:
    name = f"doctor-{secrets.token_hex(8)}"
    return Caller(id=name, tenant=name, limits=those)


def _with(url: str, prove: Callable[[Store], Awaitable[str]]) -> str:
    async def run() -> str:
        async with asyncio.timeout(TIMEOUT_S), _store(url) as store:
            return await prove(store)

    try:
        return asyncio.run(run())
    except (StoreAway, StoreError, TruthGPTError) as error:
        raise NotProven(f"Redis failed: {error}") from error
    except TimeoutError as error:
        raise NotProven(f"it took more than {TIMEOUT_S:g} s") from error


@asynccontextmanager
async def _store(url: str) -> AsyncIterator[Store]:
    store, up = Store(url, CALL_S), asyncio.Event()
    store.on_up.append(up.set)
    running = asyncio.create_task(store.run())
    try:
        await up.wait()
        yield store
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
