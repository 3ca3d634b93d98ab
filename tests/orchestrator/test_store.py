"""The store against a real redis-server: up, stalled, killed, back; scripts, subscriptions and the names of keys."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import store as names
from orchestrator.store import Script, Store, StoreAway, StoreError
from tests.clock import awake
from tests.redis import RealRedis

from .conftest import eventually, serving, until
from .fake_triton import FakeTriton

PATIENT_S = 2.0  # where the deadline is not what is tested
ADD = Script("redis.call('SET', KEYS[1], ARGV[1]) return {KEYS[1], ARGV[1] + ARGV[2]}")


@asynccontextmanager
async def running(url: str, timeout_s: float = PATIENT_S, wait: bool = True) -> AsyncIterator[Store]:
    store = Store(url, timeout_s)
    task = asyncio.create_task(store.run())
    try:
        if wait:
            await until(lambda: store.up)
        yield store
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not store.up


async def test_scripts_run_whether_redis_knows_them_or_not(server: RealRedis) -> None:
    """Many callers at once find a script that Redis has forgotten, by a flush or by a restart."""
    async with running(server.url) as store:
        for forget in (None, "flush", "restart"):
            if forget == "flush":
                assert await store.call("SCRIPT", "FLUSH") == b"OK"
            elif forget == "restart":
                server.restart()
                await until(lambda: not store.up)
                await until(lambda: store.up)
            runs = (store.run_script(ADD, [f"k{number}"], [number, 1]) for number in range(30))
            expected = [[f"k{number}".encode(), number + 1] for number in range(30)]
            assert await asyncio.gather(*runs) == expected
            assert await store.call("SCRIPT", "EXISTS", ADD.sha) == [1]
        with pytest.raises(StoreError, match="arithmetic"):
            await store.run_script(ADD, ["k"], ["x", "y"])
        with pytest.raises(StoreError, match="WRONGTYPE"):
            await store.call("HGETALL", "k1")
        assert await store.call("GET", "k1") == b"1"


async def test_a_stalled_redis_costs_one_deadline_once(caplog: pytest.LogCaptureFixture) -> None:
    """Stalled: those in flight wait for the deadline, later ones not at all; back: up again, and hooks are told."""
    caplog.set_level(logging.INFO, logger="orchestrator.store")
    with RealRedis() as server:
        async with running(server.url, timeout_s=0.05) as store:
            ups: list[float] = []
            store.on_up.append(lambda: ups.append(time.monotonic()))
            server.stop_answering()
            began = awake()

            async def up_when_it_fails(number: int) -> bool:
                with pytest.raises(StoreAway):
                    await store.call("ECHO", number)
                return store.up

            assert not any(await asyncio.gather(*(up_when_it_fails(number) for number in range(100))))
            assert awake() - began < 0.3
            began, waited = awake(), 0.0
            while awake() - began < 0.7:  # two or three attempts to reconnect lie in this
                asked = awake()
                with pytest.raises(StoreAway):
                    await store.run_script(ADD, ["k"], [1, 2])
                store.publish("c", b"lost, and nobody is told")
                waited = max(waited, awake() - asked)
                await asyncio.sleep(0.01)
            assert waited < 0.04
            assert ups == []
            server.go_on()
            assert await until(lambda: store.up) < 1.0
            assert len(ups) == 1
            assert await store.call("ECHO", "a") == b"a"
    lines = [record.getMessage() for record in caplog.records if record.name == "orchestrator.store"]
    assert [line.split(" is ")[1] for line in lines] == ["up", "away: no answer within the deadline", "up"]


async def test_a_stall_is_seen_without_any_request(server: RealRedis) -> None:
    """Health is asked for and not guessed: an idle store notices a stalled Redis by itself."""
    async with running(server.url, timeout_s=0.05) as store:
        server.stop_answering()
        try:
            assert await until(lambda: not store.up) < 1.0
        finally:
            server.go_on()
        await until(lambda: store.up)


async def test_subscriptions_outlive_a_killed_redis(server: RealRedis) -> None:
    """After a crash and a restart messages come again, without anybody subscribing anew."""
    async with running(server.url) as store:
        got: list[bytes] = []
        store.subscribe("news", got.append)
        store.publish("news", b"before")
        await until(lambda: got == [b"before"])
        server.kill()
        await until(lambda: not store.up)
        server.start()
        await until(lambda: store.up)
        store.publish("news", b"after")  # up: all subscriptions are in place
        await until(lambda: got == [b"before", b"after"])


async def test_subscribers_share_a_channel(server: RealRedis, caplog: pytest.LogCaptureFixture) -> None:
    """One subscription at the server serves all handlers, a failing one harms nobody, and the last to leave ends it."""
    async with running(server.url) as store:
        first: list[bytes] = []
        second: list[bytes] = []

        def broken(payload: bytes) -> None:
            raise ValueError("cannot read " + payload.decode())

        leave = [store.subscribe("shared", handler) for handler in (first.append, broken, second.append)]

        async def subscribed() -> bool:
            return bool(await store.call("PUBSUB", "NUMSUB", "shared") == [b"shared", 1])

        async def nobody_subscribed() -> bool:
            return bool(await store.call("PUBSUB", "NUMSUB", "shared") == [b"shared", 0])

        await eventually(subscribed)
        store.publish("shared", b"1")
        await until(lambda: (first, second) == ([b"1"], [b"1"]))
        assert "cannot read 1" in caplog.text
        leave[0]()
        leave[0]()  # leaving twice takes nobody else's place
        store.publish("shared", b"2")
        await until(lambda: second == [b"1", b"2"])
        assert first == [b"1"]
        assert await subscribed()
        leave[1]()
        leave[2]()
        await eventually(nobody_subscribed)
        store.subscribe("shared", first.append)  # and one may come again
        await eventually(subscribed)


async def test_a_redis_that_comes_late_or_refuses_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """The first log line says why; calls fail at once; nothing but the right password and a start is needed."""
    server = RealRedis("--requirepass", "hunter2")
    with server:
        server.kill()
        async with running(f"unix://:hunter2@{server.path}", wait=False) as store:
            await until(lambda: "is away" in caplog.text)
            with pytest.raises(StoreAway):
                await store.call("PING")
            server.start()
            await until(lambda: store.up)
            assert await store.call("PING") == b"PONG"
            caplog.clear()
            async with running(f"unix://:wrong@{server.path}", wait=False) as refused:
                await until(lambda: "WRONGPASS" in caplog.text)
                await asyncio.sleep(0.6)  # attempts go on
                assert not refused.up
            assert caplog.text.count("is away") == 1
            assert "hunter2" not in caplog.text


async def test_a_hook_that_fails_harms_nobody(server: RealRedis, caplog: pytest.LogCaptureFixture) -> None:
    """What one part does wrong when Redis comes up is logged, and the next part is told all the same."""
    store = Store(server.url, PATIENT_S)
    told: list[bool] = []

    def broken() -> None:
        raise ValueError("cannot refresh")

    store.on_up += [broken, lambda: told.append(store.up)]
    task = asyncio.create_task(store.run())
    await until(lambda: told == [True])
    assert "cannot refresh" in caplog.text
    assert await store.call("PING") == b"PONG"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_redis_never_decides_over_requests(fake: FakeTriton) -> None:
    """With Redis stalled the gateway stays ready and answers as fast; deep health says that Redis is away."""
    with RealRedis() as server:
        async with serving(fake, redis_url=server.url, redis_timeout_s=0.2) as stack:

            async def seen_up() -> bool:
                return bool((await stack.get("/health"))[1]["redis"]["up"])

            async def seen_away() -> bool:
                return not await seen_up()

            await eventually(seen_up)
            server.stop_answering()
            await eventually(seen_away)
            began = awake()
            assert (await stack.post("/v1/completions", {"model": "m", "prompt": "x"}))[0] == 200
            assert awake() - began < 0.5
            assert (await stack.get("/health/ready"))[0] == 200


def test_the_password_is_not_kept_for_show() -> None:
    """The URL that logs show has no password."""
    assert "hunter2" not in Store("redis://:hunter2@127.0.0.1:1/0", 0.1).url


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8) | st.sampled_from(
    ["a", "a:b", "b:l:a", "{a}", "}:l:a", "ip-::1", "ip-fe80::1%eth0", "%7B", "l", "é", " ", "*", "\n"]
)


@settings(max_examples=60)
@given(st.tuples(text, text, text), st.tuples(text, text, text))
def test_no_name_can_be_forged(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    """Whatever tenants, subjects and endpoints are called, different ones have different keys in their own hash tag."""

    def keys(tenant: str, subject: str, endpoint: str) -> list[str]:
        made = [
            names.limits_key(tenant, subject, endpoint), names.leases_key(tenant, subject),
            names.answer_key(tenant, subject), names.flight_key(tenant, subject), names.stats_key(tenant),
        ]  # fmt: skip
        tags = {key[key.index("{") + 1 : key.index("}")] for key in made}
        assert len(tags) == 1 and all(key.count("{") == key.count("}") == 1 for key in made)
        assert all(key.isascii() and key.isprintable() and " " not in key for key in made)
        return made

    first, second = keys(*one), keys(*other)
    assert len({*first}) == 5
    assert (first[0] == second[0]) == (one == other)
    assert (first[1] == second[1]) == (one[:2] == other[:2])
    assert (first[4] == second[4]) == (one[0] == other[0])
    assert one[0] == other[0] or not {*first} & {*second}


def test_names_of_the_usual_kind_stay_readable() -> None:
    """Ordinary tenants, keys and addresses are in their keys as they are; an empty part is refused."""
    assert names.limits_key("acme", "ip-::1", "chat") == "truthgpt:{acme}:l:ip-::1:chat"
    assert names.leases_key("acme", "k_1") == "truthgpt:{acme}:n:k_1"
    assert names.worker_channel("0a1b") == "truthgpt:worker:0a1b"
    for empty in (lambda: names.stats_key(""), lambda: names.leases_key("a", ""), lambda: names.worker_channel("")):
        with pytest.raises(ValueError):
            empty()
