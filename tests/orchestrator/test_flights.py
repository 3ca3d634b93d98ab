"""Single-flight against a real Redis: in one process, over two, and while either of them or Redis is lost."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from orchestrator.cache import Lookup
from orchestrator.domain import CachePolicy
from orchestrator.errors import Draining, EmptyAnswer, InternalError, Overloaded, UpstreamUnavailable
from tests.redis import RealRedis

from .conftest import until
from .flying import QUICK, WORDS, Child, Replica, Upstream, read, replica

ANSWER = "".join(WORDS)


@pytest.fixture
def fresh() -> Iterator[RealRedis]:
    """A Redis of the test's own, to be stalled or killed."""
    with RealRedis() as running:
        yield running


@pytest.fixture
async def one(server: RealRedis) -> AsyncIterator[Replica]:
    async with replica(server.url) as worker:
        await worker.store.call("FLUSHALL")
        yield worker


@pytest.fixture
async def two(server: RealRedis, one: Replica) -> AsyncIterator[tuple[Replica, Replica]]:
    """Two workers that share a Redis and an upstream."""
    async with replica(server.url, one.upstream) as other:
        yield one, other


async def stored(worker: Replica) -> list[bytes]:
    """The entries in Redis."""
    found: list[bytes] = await worker.store.call("KEYS", "truthgpt:*:c:*")
    return found


async def locks(worker: Replica) -> list[bytes]:
    found: list[bytes] = await worker.store.call("KEYS", "truthgpt:*:f:*")
    return found


async def locked(worker: Replica, count: int) -> None:
    """Wait until so many flights hold a lock."""
    for _ in range(500):
        if len(await locks(worker)) == count:
            return
        await asyncio.sleep(0.002)
    raise AssertionError(await locks(worker))


async def test_callers_of_one_process_share(one: Replica) -> None:
    """Twenty at once and one who comes in the middle read the same answer of one call; the next one reads the cache."""
    asked = [asyncio.create_task(one.ask()) for _ in range(20)]
    one.upstream.first.set()
    first = await one.join()
    chunk = await anext(first)
    late = await one.join()
    one.upstream.rest.set()
    assert await asyncio.gather(*asked) == [ANSWER] * 20
    assert chunk.text + await read(first) == ANSWER == await read(late) == await one.ask()
    assert one.upstream.calls == one.upstream.closed == 1
    assert (await one.enter())[1].state == "hit" and await locks(one) == []


async def test_callers_of_one_process_share_without_redis() -> None:
    """Redis away changes nothing within a process."""
    async with replica("unix:///nowhere/redis.sock", wait=False) as worker:
        asked = [asyncio.create_task(worker.ask()) for _ in range(5)]
        await until(lambda: worker.upstream.calls > 0)
        worker.upstream.go()
        assert await asyncio.gather(*asked) == [ANSWER] * 5 and worker.upstream.calls == 1


async def test_callers_who_come_while_the_answer_is_being_stored_share(one: Replica) -> None:
    """A flight can be joined after its end until the store was acknowledged: a look-up from before gets that answer."""
    wanted, lookup = await one.enter()
    await read(one.flights.join(wanted, lookup, one.upstream.go().stream))
    late = one.flights.join(wanted, Lookup("follow", leader=one.store.worker), one.upstream.stream)
    assert await read(late) == ANSWER and late.shared
    await until(lambda: not one.flights._running)
    # later still it is found in the cache by a second look-up, as if another flight had been there
    later = one.flights.join(wanted, Lookup("follow", leader=one.store.worker), one.upstream.stream)
    assert await read(later) == ANSWER and later.shared and one.upstream.calls == 1


async def test_whenever_callers_come_there_is_one_call(two: tuple[Replica, Replica]) -> None:
    """Callers at random moments before, during and after a flight, in two workers, make one call."""
    for worker in two:
        worker.upstream = two[0].upstream
    two[0].upstream.go().pause_s = 0.003

    async def later(worker: Replica, text: str, delay_s: float) -> str:
        await asyncio.sleep(delay_s)
        return await worker.ask(text)

    texts = [f"question {n}" for n in range(20)]
    asked = [later(random.choice(two), text, random.random() * 0.03) for text in texts for _ in range(10)]
    assert set(await asyncio.gather(*asked)) == {ANSWER}
    assert two[0].upstream.calls == len(texts)


async def test_the_flight_belongs_to_nobody(two: tuple[Replica, Replica]) -> None:
    """Who came first hangs up in the middle: the others, of both workers, get the whole answer, and it is stored."""
    here, there = two
    first = await here.join()
    here.upstream.first.set()
    await anext(first)
    others = [await here.join(), await there.join()]
    assert (await anext(others[1])).text == WORDS[0]
    await first.aclose()
    here.upstream.rest.set()
    assert await asyncio.gather(*(read(other) for other in others)) == [ANSWER, "".join(WORDS[1:])]
    assert others[1].shared and here.upstream.calls == 1
    await until(lambda: not here.flights._running)
    assert len(await stored(here)) == 1


@pytest.mark.parametrize("started", [False, True])
async def test_the_last_one_closes_the_upstream(two: tuple[Replica, Replica], started: bool) -> None:
    """Before and after the first chunk: when the last caller of all workers has left, the upstream is closed."""
    here, there = two
    flight = await here.join()
    other = await there.join()
    if started:
        here.upstream.first.set()
        await anext(flight)
        await anext(other)
    else:
        await until(lambda: bool(here.flights._relay._sending))
    await flight.aclose()
    await asyncio.sleep(0.05)
    assert here.upstream.closed == 0
    await other.aclose()
    assert await until(lambda: here.upstream.closed == 1) < 1.0
    await locked(here, 0)
    assert await stored(here) == []


async def test_an_upstream_that_closes_slowly_takes_nobodys_lock(one: Replica) -> None:
    """The next flight of the same key may begin before the one that was left has closed, and keeps its own lock."""
    one.upstream.closing_s = 0.05
    left = await one.join()
    await until(lambda: one.upstream.calls == 1)
    await left.aclose()
    flight = await one.join()
    await until(lambda: one.upstream.closed == 1)
    await asyncio.sleep(0.02)
    assert one.upstream.calls == 2 and len(await locks(one)) == 1
    one.upstream.go()
    assert await read(flight) == ANSWER


async def test_a_flight_that_nobody_read_is_closed(one: Replica) -> None:
    """Leaving before having asked for the first chunk counts as leaving."""
    flight = await one.join()
    await until(lambda: one.upstream.calls == 1)
    await flight.aclose()
    await until(lambda: one.upstream.closed == 1)
    assert one.flights._running == {}


async def test_leaving_after_the_last_chunk_stores(one: Replica) -> None:
    """Who has seen the finish reason and closes, as a client does, cuts nothing short."""
    one.upstream.linger_s = 0.02
    flight = await one.join()
    one.upstream.go()
    async for chunk in flight:
        if chunk.finish_reason:
            break
    await flight.aclose()
    await until(lambda: not one.flights._running)
    assert len(await stored(one)) == 1


async def test_a_slow_reader_slows_nobody(one: Replica) -> None:
    """One who reads a chunk every 20 ms gets all, the other ends at once."""
    one.upstream.words = ["x"] * 20
    slow = asyncio.create_task(read(await one.join(), pause_s=0.02))
    fast = asyncio.create_task(one.ask())
    one.upstream.go()
    assert await fast == "x" * 20 and not slow.done()
    assert await slow == "x" * 20


@pytest.mark.parametrize("error", [Overloaded("full", 7.5), EmptyAnswer(), ZeroDivisionError("ours")])
async def test_an_error_reaches_everybody(two: tuple[Replica, Replica], error: Exception) -> None:
    """Callers of both workers get the upstream's error; nothing is stored, and the next caller asks anew."""
    here, there = two
    here.upstream.error = error
    flights = [await here.join(), await here.join(), await there.join(), await there.join()]
    here.upstream.go()
    expected = type(error) if not isinstance(error, ZeroDivisionError) else InternalError
    for flight in flights:
        with pytest.raises(expected) as raised:
            await read(flight)
        assert raised.type is expected
        if isinstance(raised.value, Overloaded):
            assert raised.value.retry_after_s == 7.5 and "cola" in raised.value.text.es
    assert here.upstream.calls == 1
    here.upstream.error = None
    assert await there.ask() == ANSWER and here.upstream.calls == 2


async def test_only_whole_answers_of_the_model_are_stored(one: Replica) -> None:
    """Neither a fallback's answer, nor one without a finish reason, nor one that failed; a fallback is marked."""
    one.upstream.fallback = "text"
    flights = [await one.join(), await one.join()]
    one.upstream.go()
    assert [await read(flight) for flight in flights] == [ANSWER] * 2
    assert [flight.outcome.fallback for flight in flights] == ["text"] * 2
    one.upstream.fallback, one.upstream.finish = None, None
    async for _ in await one.join():
        pass
    one.upstream.error = UpstreamUnavailable()
    with pytest.raises(UpstreamUnavailable):
        await one.ask()
    assert await stored(one) == [] and await locks(one) == []
    assert one.upstream.calls == 3


async def test_followers_elsewhere_are_told_of_a_fallback(two: tuple[Replica, Replica]) -> None:
    """The mark travels before the first chunk."""
    here, there = two
    here.upstream.fallback = "model=small"
    flights = [await here.join(), await there.join()]
    here.upstream.first.set()
    for flight in flights:
        await anext(flight)
        assert flight.outcome.fallback == "model=small"
    assert flights[1].shared and here.upstream.calls == 1
    for flight in flights:
        await flight.aclose()


async def test_an_answer_over_the_bound_is_not_stored(server: RealRedis) -> None:
    """The bound is on the entry as stored; what is left out is counted."""
    noise = "".join(chr(random.randrange(32, 0xD000)) for _ in range(3000))
    async with replica(server.url, Upstream(words=[noise]).go(), limit_bytes=2000) as worker:
        await worker.store.call("FLUSHALL")
        assert await worker.ask() == noise
        await until(lambda: not worker.flights._running)
        assert await stored(worker) == []
        assert await worker.store.call("HGET", "truthgpt:{t}:s", "large:text_generation") == b"1"
        worker.upstream.words = ["a" * 3000]
        assert await worker.ask("compresses") == "a" * 3000
        await until(lambda: not worker.flights._running)
        assert len(await stored(worker)) == 1


async def test_vectors_over_the_bound_are_not_written_out(server: RealRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes that do not get smaller are found too large without making an entry of them, and counted."""
    monkeypatch.setattr("orchestrator.flights.encode", lambda *_: pytest.fail("written out"))
    async with replica(server.url, Upstream(words=["a" * 3000]).go(), limit_bytes=2000) as worker:
        await worker.store.call("FLUSHALL")
        ticket, lookup = await worker.enter()
        ticket.task = "embeddings"
        assert await read(worker.flights.join(ticket, lookup, worker.upstream.stream)) == "a" * 3000
        await until(lambda: not worker.flights._running)
        assert await stored(worker) == []
        assert await worker.store.call("HGET", "truthgpt:{t}:s", "large:embeddings") == b"1"


async def test_an_answer_that_cannot_be_stored_is_given_and_forgotten(
    one: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in making its entry, nobody joins the flight afterwards, and its lock is given back."""
    monkeypatch.setattr("orchestrator.flights.encode", lambda *_: 1 / 0)
    flight = await one.join()
    one.upstream.go()
    assert await read(flight) == ANSWER
    await until(lambda: not one.flights._running)
    await locked(one, 0)
    assert await stored(one) == []


async def test_policies(one: Replica) -> None:
    """no-cache asks anew, alone, and stores; no-store leaves no trace; max-age bounds the age."""
    one.upstream.go()
    assert await one.ask() == ANSWER
    one.upstream.words = ["new"]
    assert await one.ask(policy=CachePolicy(store=False)) == "new"
    await until(lambda: not one.flights._running)
    assert await one.ask() == ANSWER
    assert await one.ask(policy=CachePolicy(max_age_s=60)) == ANSWER
    assert await one.ask(policy=CachePolicy(lookup=False)) == "new"
    await until(lambda: not one.flights._running)
    assert await one.ask() == "new" and one.upstream.calls == 3
    one.upstream.words = ["newer"]
    await asyncio.sleep(0.01)
    assert await one.ask(policy=CachePolicy(max_age_s=0)) == "newer"


async def test_no_cache_joins_nobody_and_takes_nobodys_lock(one: Replica) -> None:
    """Beside a flight that runs, a no-cache request makes a call of its own and leaves the flight's lock alone."""
    flight = await one.join()
    fresh = await one.join(policy=CachePolicy(lookup=False))
    await until(lambda: one.upstream.calls == 2)
    await fresh.aclose()
    await until(lambda: one.upstream.closed == 1)
    wanted, lookup = await one.enter(policy=CachePolicy(lookup=False))
    assert await read(one.flights.join(wanted, lookup, Upstream(words=["new"]).go().stream)) == "new"
    await until(lambda: len(one.flights._tasks) == 1)  # it is stored
    assert len(await stored(one)) == len(await locks(one)) == 1
    one.upstream.go()
    assert await read(flight) == ANSWER


async def test_tenants_never_share(two: tuple[Replica, Replica]) -> None:
    """The same request of two tenants, at the same time and afterwards, makes two calls; an answer stays with each."""
    here, there = two
    asked = [asyncio.create_task(worker.ask(tenant=name)) for worker in two for name in ("a", "b")]
    await until(lambda: here.upstream.calls == 2)
    here.upstream.go()
    assert await asyncio.gather(*asked) == [ANSWER] * 4
    await until(lambda: not here.flights._running)
    here.upstream.words = ["other"]
    assert [await there.ask(tenant=name) for name in ("a", "b", "c")] == [ANSWER, ANSWER, "other"]
    await until(lambda: not there.flights._running)
    assert sorted(key.split(b":")[1] for key in await stored(here)) == [b"{a}", b"{b}", b"{c}"]


async def test_the_lock_outlives_its_life(two: tuple[Replica, Replica]) -> None:
    """A flight longer than the life of its lock keeps it: a caller elsewhere still follows."""
    here, there = two
    flight = await here.join()
    await asyncio.sleep(3 * here.flights.lock_ms / 1000)
    other = await there.join()
    here.upstream.go()
    assert [await read(flight), await read(other)] == [ANSWER] * 2 and here.upstream.calls == 1


async def test_a_leader_that_never_begins_is_replaced(two: tuple[Replica, Replica]) -> None:
    """A worker that took the lock and lost its caller before the flight began answers that it has none."""
    here, there = two
    await here.enter()  # takes the lock, and nothing follows
    there.upstream.go()
    assert await there.ask() == ANSWER
    assert await here.ask() == ANSWER and here.upstream.calls == 1


async def test_a_hundred_over_two_processes_make_one_call(server: RealRedis, one: Replica) -> None:
    """A hundred identical requests over two processes, half of them while the answer streams, make one call."""
    async with AsyncExitStack() as stack:
        children = [
            await stack.enter_async_context(Child.started(server.url, first_s=0.1, pause_s=0.15)) for _ in range(2)
        ]
        asked = [asyncio.create_task(child.ask()) for child in children for _ in range(25)]
        await locked(one, 1)
        flight = await one.join()
        await anext(flight)
        assert flight.shared and len(await locks(one)) == 1  # the answer streams
        await flight.aclose()
        asked += [asyncio.create_task(child.ask()) for child in children for _ in range(25)]
        assert await asyncio.gather(*asked) == [ANSWER] * 100
        assert sum([await child.calls() for child in children]) == 1


async def test_the_leading_process_is_killed_before_its_first_chunk(server: RealRedis, one: Replica) -> None:
    """kill -9 of the process that leads: those who follow get the answer of another leader, in one call."""
    one.upstream.go()
    async with Child.started(server.url, first_s=60.0) as child:
        doomed = asyncio.create_task(child.ask())
        await locked(one, 1)
        followers = [asyncio.create_task(one.ask()) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert one.upstream.calls == 0
        child.process.send_signal(signal.SIGKILL)
        assert await asyncio.gather(*followers) == [ANSWER] * 5 and one.upstream.calls == 1
        doomed.cancel()


async def test_the_leading_process_is_killed_in_the_middle(server: RealRedis, one: Replica) -> None:
    """After the first chunk nothing can be mended: an error in the stream, soon, and the next caller asks anew."""
    async with Child.started(server.url, first_s=0.0, pause_s=0.2) as child:
        doomed = asyncio.create_task(child.ask())
        await locked(one, 1)
        flight = await one.join()
        assert (await anext(flight)).text == WORDS[0]
        child.process.send_signal(signal.SIGKILL)
        with pytest.raises(UpstreamUnavailable):
            await read(flight)
        doomed.cancel()
    one.upstream.go()
    assert await one.ask() == ANSWER and one.upstream.calls == 1


@pytest.mark.parametrize("started", [False, True])
async def test_a_worker_that_stops_sends_its_followers_away(server: RealRedis, one: Replica, started: bool) -> None:
    """At once, not after a silence: before the first chunk another leads, in the middle it is an error."""
    slow = replace(QUICK, silence_s=60.0)
    upstream = Upstream()
    async with replica(server.url, times=slow) as other:
        other.upstream.go()
        async with replica(server.url, upstream, slow) as leader:
            first = await leader.join()
            flight = await other.join()
            if started:
                upstream.first.set()
                await anext(flight)
            else:
                await until(lambda: bool(leader.flights._relay._sending))
        with pytest.raises(Draining):
            await read(first)
        if started:
            with pytest.raises(UpstreamUnavailable):
                await asyncio.wait_for(read(flight), 2.0)
        else:
            assert await asyncio.wait_for(read(flight), 2.0) == ANSWER and not flight.shared
        assert upstream.closed == 1


async def test_idle_waits_for_readers_of_other_processes(two: tuple[Replica, Replica]) -> None:
    """A worker whose own callers have all left still has something to do."""
    here, there = two
    first = await here.join()
    flight = await there.join()
    await until(lambda: bool(here.flights._relay._sending))
    await first.aclose()
    idle = asyncio.create_task(here.flights.idle())
    await asyncio.sleep(0.02)
    assert not idle.done()
    here.upstream.go()
    assert await read(flight) == ANSWER
    await asyncio.wait_for(idle, 2.0)


@pytest.mark.parametrize("lost", ["stalled", "restarted"])
@pytest.mark.parametrize("started", [False, True])
async def test_redis_is_lost_in_the_middle(fresh: RealRedis, lost: str, started: bool) -> None:
    """Stalled, or killed and restarted empty, before or after the first chunk: every caller gets the whole answer."""
    upstream = Upstream()
    async with (
        replica(fresh.url, upstream, timeout_s=0.05) as here,
        replica(fresh.url, upstream, timeout_s=0.05) as there,
    ):
        flights = [await here.join(), await there.join()]
        if started:
            upstream.first.set()
            for flight in flights:
                assert (await flight.__anext__()).text == WORDS[0]
                flight._at = 0
        readers = [asyncio.create_task(read(flight)) for flight in flights]
        await asyncio.sleep(0.05)
        if lost == "stalled":
            fresh.stop_answering()
        else:
            fresh.kill()
        await until(lambda: not (here.store.up or there.store.up))
        upstream.go()
        newcomers = [asyncio.create_task(worker.ask()) for worker in (here, there)]
        if not started:
            assert await asyncio.wait_for(readers[1], 0.5) == ANSWER  # waits for no Redis
        assert await asyncio.wait_for(newcomers[0], 0.5) == ANSWER == await readers[0]
        if lost == "stalled":
            fresh.go_on()
        else:
            fresh.start()
        assert await asyncio.gather(*readers, *newcomers) == [ANSWER] * 4
        assert upstream.calls == (1 if started else 2)


async def test_an_answer_of_another_version_is_not_stored(one: Replica) -> None:
    """A model that was reloaded after the look-up answers its caller, and never under the old version's key."""
    one.upstream.go().version = "2"
    assert await one.ask() == ANSWER
    assert await stored(one) == [] and await locks(one) == []
    one.upstream.version = "1"
    assert await one.ask() == ANSWER
    assert len(await stored(one)) == 1
