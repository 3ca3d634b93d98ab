"""The gateway in front of several Tritons that die, stall, flap, refuse, are full or have another version."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis

from tests.clock import awake
from tests.encoding import CLASSIFIES, EMBEDS
from tests.redis import RealRedis

from .conftest import Stack, serving, until
from .fake_triton import FakeTriton, Step, answer, event, failure
from .fleets import fakes

PATH = "/v1/completions"
PLAIN: dict[str, Any] = {"model": "m", "prompt": "Hola"}
NUMBERS = {"inputs": [{"name": "x", "datatype": "INT32", "shape": [1], "data": [1]}]}


@pytest.fixture
async def pair() -> AsyncIterator[list[FakeTriton]]:
    async with fakes(2) as both:
        yield both


@asynccontextmanager
async def several(those: Sequence[FakeTriton], **changes: Any) -> AsyncIterator[Stack]:
    """The gateway over these, all of them ready."""
    urls = ",".join(fake.url for fake in those)
    quick = {"triton_eject_s": 0.3, "breaker_failures": 5, "max_concurrency": 500, "redis_timeout_s": 5.0}
    async with serving(those[0], triton_urls=urls, **{**quick, **changes}) as stack:
        fleet = stack.gateway.fleet
        await until(lambda: all(state.state == "ready" for state in fleet.states()))
        yield stack


def states(stack: Stack) -> dict[str, str]:
    return {state.url: state.state for state in stack.gateway.fleet.states()}


async def text(stack: Stack, **body: Any) -> str:
    status, answered, _ = await stack.post(PATH, {**PLAIN, **body})
    assert status == 200, answered
    return str(answered["choices"][0]["text"])


async def many(stack: Stack, count: int) -> Counter[int]:
    """The statuses of so many requests at once."""
    answers = await asyncio.gather(*(stack.post(PATH, {**PLAIN, "prompt": f"p{n}"}) for n in range(count)))
    return Counter(status for status, _, _ in answers)


async def test_requests_are_shared(pair: list[FakeTriton]) -> None:
    """Sixteen requests at once are eight for each server, and health shows both."""
    for fake in pair:
        fake.script = [0.2, *answer("a")]
    async with several(pair) as stack:
        assert await many(stack, 16) == {200: 16}
        assert [len(fake.requests) for fake in pair] == [8, 8]
        _, health, _ = await stack.get("/health")
        rows = {row["url"]: row for row in health["tritons"]}
        assert rows.keys() == {fake.url for fake in pair}
        assert all(row["state"] == "ready" and row["outstanding"] == 0 for row in rows.values())
        assert all(0 <= row["answered_s"] < 5 for row in rows.values())
        assert health["triton"]["up"] and all(url in health["triton"]["url"] for url in rows)
        assert health["models"][0]["slots"] == 8


@pytest.mark.parametrize("script", [[math.inf], [event(), math.inf]], ids=["silent", "queued"])
async def test_a_killed_server_fails_nobody_without_a_token(pair: list[FakeTriton], script: list[Step]) -> None:
    """Of the many requests on it none fails, whatever the budget that all retries share; the breaker stays closed, and
    the server rests before a heartbeat has said anything.
    """
    pair[0].script = pair[1].script = script
    async with several(pair, retries=1, breaker_failures=3, heartbeat_interval_s=60.0, stall_s=60.0) as stack:
        asking = [asyncio.create_task(stack.post(PATH, {**PLAIN, "prompt": f"p{n}"})) for n in range(96)]
        await until(lambda: pair[0].running == pair[1].running == 48)
        pair[1].script = answer("a")
        await pair[0].stop()
        await until(lambda: sum(task.done() for task in asking) == 48)
        assert {task.result()[0] for task in asking if task.done()} == {200}
        fleet = stack.gateway.fleet
        assert [member.resting for member in fleet.members if member.url == pair[0].url] == [True]
        assert fleet.failovers == 48 and stack.gateway.breakers == {"m": "closed"}
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await pair[0].start(pair[0].port)


async def test_streams_that_had_tokens_are_told_and_take_the_model_nowhere(pair: list[FakeTriton]) -> None:
    """Half an answer ends in an error; so many of them open no breaker while another server is well."""
    pair[0].script = pair[1].script = [event("a"), math.inf]
    async with several(pair, breaker_failures=3, stall_s=20.0) as stack:
        asking = [asyncio.create_task(stack.events(PATH, {**PLAIN, "stream": True})) for _ in range(20)]
        await until(lambda: pair[0].running == pair[1].running == 10)
        await asyncio.sleep(0.1)
        pair[1].script = answer("b")
        await pair[0].stop()
        await until(lambda: sum(task.done() for task in asking) == 10)
        done, rest = [task for task in asking if task.done()], [task for task in asking if not task.done()]
        assert stack.gateway.breakers == {"m": "closed"}
        for task in done:
            assert json.loads(task.result()[-1])["error"]["code"] == "model_unavailable"
        assert await text(stack) == "b"
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await pair[0].start(pair[0].port)


async def test_a_stalled_server_is_left_for_another(pair: list[FakeTriton]) -> None:
    """One that accepts and says nothing costs a request the time that silence is borne, once, and rests then."""
    async with several(pair, stall_s=0.4, heartbeat_interval_s=10.0, retries=1) as stack:
        pair[0].script = [math.inf]
        began = awake()
        assert await many(stack, 8) == {200: 8}
        assert awake() - began < 5.0 and states(stack)[pair[0].url] == "ejected"
        asked = len(pair[0].requests)
        assert await many(stack, 8) == {200: 8} and len(pair[0].requests) == asked


async def test_a_server_that_flaps_is_damped(pair: list[FakeTriton]) -> None:
    """One that dies again and again rests twice as long each time; nobody's request fails of it."""
    async with several(pair, retries=1, triton_eject_s=0.1) as stack:
        member = next(m for m in stack.gateway.fleet.members if m.url == pair[0].url)
        rests = []
        for _ in range(4):
            await until(lambda: states(stack)[pair[0].url] == "ready")
            await pair[0].stop()
            assert await many(stack, 8) == {200: 8}
            await until(lambda: member.resting)
            rests.append(round(member.ejection.rest_s, 3))
            await pair[0].start(pair[0].port)
        assert rests == [0.1, 0.2, 0.4, 0.8]


async def test_a_dead_stub_is_left_for_another_server(pair: list[FakeTriton]) -> None:
    """Its requests go elsewhere at once, before a heartbeat says so; the server is not ejected for one model."""
    pair[0].script = [failure("[unavailable] Stub process 'm' is not healthy."), "end"]
    async with several(pair, retries=1, heartbeat_interval_s=10.0) as stack:
        assert await many(stack, 30) == {200: 30}
        assert states(stack)[pair[0].url] == "ready" and stack.gateway.breakers == {"m": "closed"}


async def test_without_retries_nothing_is_asked_twice(pair: list[FakeTriton]) -> None:
    """The setting holds for other servers as well, but for a full queue."""
    pair[0].script = ["close"]
    async with several(pair, retries=0, heartbeat_interval_s=10.0) as stack:
        counts = await many(stack, 2)
        assert counts == {200: 1, 503: 1} and sum(len(fake.requests) for fake in pair) == 2


async def test_when_all_fail_it_is_the_models_fault(pair: list[FakeTriton]) -> None:
    """With nobody left to take over, a request fails as with one server, and counts for the breaker."""
    pair[0].script = pair[1].script = ["close"]
    async with several(pair, retries=2, breaker_failures=2, heartbeat_interval_s=10.0) as stack:
        assert (await stack.post(PATH, PLAIN))[0] == 503
        assert len(pair[0].requests) + len(pair[1].requests) == 3
        assert (await stack.post(PATH, PLAIN))[0] == 503
        assert stack.gateway.breakers == {"m": "open"}


async def test_a_full_queue_is_left_for_one_that_has_room(pair: list[FakeTriton]) -> None:
    """Once, also without retries; where both are full the client is told so, and nobody rests for it."""
    pair[0].script = [failure("resource_exhausted: full"), "end"]
    async with several(pair, retries=0) as stack:
        assert await many(stack, 10) == {200: 10}
        pair[1].script = pair[0].script
        before = len(pair[0].requests) + len(pair[1].requests)
        status, body, _ = await stack.post(PATH, PLAIN)
        assert (status, body["error"]["code"]) == (503, "queue_full")
        assert len(pair[0].requests) + len(pair[1].requests) == before + 2
        assert set(states(stack).values()) == {"ready"} and stack.gateway.breakers == {"m": "closed"}


async def test_encoders_and_other_models_are_taken_over(pair: list[FakeTriton]) -> None:
    """Texts to embed and plain inference are answered by the server that is left."""
    for fake in pair:
        fake.models |= {"e": "READY", "plain": "READY"}
        fake.encoders, fake.other_backends = {"e": EMBEDS}, {"plain"}
    async with several(pair, retries=1, heartbeat_interval_s=10.0, heartbeat_timeout_s=5.0) as stack:
        await until(lambda: len(stack.gateway.served) == 3 and stack.gateway.ready)
        await pair[0].stop()
        for _ in range(3):
            assert (await stack.post("/v1/embeddings", {"model": "e", "input": ["a", "b"]}))[0] == 200
            assert (await stack.post("/v2/models/plain/infer", NUMBERS))[0] == 200
            for member in stack.gateway.fleet.members:
                member.ejection.until = None  # it looks as if it were well
        assert await text(stack, prompt=[1, 2]) == "Hola, ¿qué tal?", "a tokenizer is asked, and the other one answers"
        await pair[0].start(pair[0].port)


async def test_a_long_list_of_texts_is_answered_by_one_version(pair: list[FakeTriton]) -> None:
    """While the servers have two versions, each text of a request is read by the same one, also when that is found out
    in the middle.
    """
    for fake in pair:
        fake.models, fake.encoders, fake.encode_pause_s = {"e": "READY"}, {"e": {**EMBEDS, "max_batch_size": 2}}, 0.01
    async with several(pair) as stack:
        pair[1].version = pair[1].beat["digest"] = "2"
        for _ in range(3):
            before = [len(fake.read) for fake in pair]
            status, body, _ = await stack.post("/v1/embeddings", {"model": "e", "input": [f"t{n}" for n in range(12)]})
            assert status == 200 and len(body["data"]) == 12
            parts = [len(fake.read) - count for fake, count in zip(pair, before, strict=True)]
            assert parts[0] == 0 or parts[1] >= 6 or parts[0] >= 6
        assert stack.gateway.fleet.require("e").version == "2"
        assert parts == [0, 6]


async def test_no_answer_of_another_version_is_stored(
    pair: list[FakeTriton], server: RealRedis, client: redis.Redis
) -> None:
    """What a server with another version has written is given to who asked, and to nobody who asks later."""

    def written(version: str, said: str) -> list[Step]:
        own = b'"model_version": "%s"' % version.encode()
        return [event(said, "stop").replace(b'"model_version": "1"', own), "end"]

    async with fakes(1) as (third,), several([*pair, third], redis_url=server.url) as stack:
        third.version = third.beat["digest"] = "2"
        await until(lambda: "version 2" in stack.gateway.served[0].detail)
        for fake in pair:
            fake.script = written("1", "one")
        third.script = written("2", "two")
        seen: Counter[str] = Counter()
        for number in range(30):
            ask = {"prompt": f"p{number}", "temperature": 0}
            first, again = await text(stack, **ask), await text(stack, **ask)
            seen[first] += 1
            assert first == "two" or again == "one", "an answer of the served version is stored"
            if first == "two":
                status, _, headers = await stack.post(PATH, {**PLAIN, **ask})
                assert status == 200 and (again == "two" or headers["x-cache"] == "hit")
        assert seen["one"] and seen["two"]


async def test_drained_in_redis_is_drained_in_the_gateway(
    pair: list[FakeTriton], server: RealRedis, client: redis.Redis
) -> None:
    """Within a second of the command no request goes there, and after the other one they do again."""
    from orchestrator.ops.servers import drain, resume

    async with several(pair, redis_url=server.url, cache=False) as stack:
        await asyncio.to_thread(drain, client, pair[0].url)
        assert await until(lambda: states(stack)[pair[0].url] == "draining") < 1.0
        before = len(pair[0].requests)
        assert await many(stack, 10) == {200: 10} and len(pair[0].requests) == before
        await asyncio.to_thread(resume, client, pair[0].url)
        assert await until(lambda: states(stack)[pair[0].url] == "ready") < 1.0


async def test_classes_are_taken_over_in_the_middle(pair: list[FakeTriton]) -> None:
    """A request of several parts, whose server dies between two of them, is answered by the other one."""
    for fake in pair:
        fake.models, fake.encoders = {"c": "READY"}, {"c": {**CLASSIFIES, "max_batch_size": 1}}
        fake.encode_pause_s = 0.05
    async with several(pair, retries=1) as stack:
        body = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [8, 1], "data": list("abcdefgh")}]}
        asking = asyncio.create_task(stack.post("/v2/models/c/infer", body))
        await until(lambda: len(pair[0].read) >= 2)
        await pair[0].stop()
        status, answered, _ = await asking
        assert status == 200 and answered["outputs"][0]["shape"][0] == 8
        await pair[0].start(pair[0].port)
