"""Two workers on one port behave as one gateway: limits, keys, single-flight and cache, with real Redis and Triton."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from orchestrator.logwriter import COLLECT_S
from tests.clock import awake
from tests.counting import write_entry

from .stack import Stack, wait_until

MANY = 100


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    folder = Path(tempfile.mkdtemp(prefix="truthgpt-e2e-"))
    write_entry(folder / "repository", slots=4, step_delay_ms=20, max_queue=80, max_len=2000)
    extra = {"TRUTHGPT_WORKERS": "2", "TRUTHGPT_AUTH": "keys"}
    running = Stack(folder / "home", folder / "repository", extra=extra)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        assert running.leftovers() == []
        shutil.rmtree(folder)


def create_key(stack: Stack, *options: str) -> dict[str, Any]:
    made = stack.cli("keys", "create", "--tenant", "acme", *options, "--json")
    assert made.returncode == 0, made.stderr
    return dict(json.loads(made.stdout))


@pytest.fixture(scope="module")
def key(stack: Stack) -> str:
    return str(create_key(stack)["key"])


@asynccontextmanager
async def client(stack: Stack, key: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A connection for each request, so that the kernel spreads them over the workers."""
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{stack.ports['HTTP']}",
        headers={"authorization": f"Bearer {key}"},
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
    ) as session:
        yield session


async def ask(http: aiohttp.ClientSession, **body: Any) -> tuple[int, str, str]:
    """Status, X-Cache and the whole text of one completion."""
    async with http.post("/v1/completions", json={"model": "counting", **body}) as answer:
        text = await answer.text()
        if answer.status == 200 and not body.get("stream"):
            text = json.loads(text)["choices"][0]["text"]
        elif answer.status == 200:
            *events, done = [line[6:] for line in text.split("\n\n") if line]
            assert done == "[DONE]", text
            text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
        return answer.status, answer.headers.get("x-cache", ""), text


def served_by(stack: Stack) -> Counter[int]:
    """Requests that each worker has recorded."""
    time.sleep(2 * COLLECT_S)  # a line is written a moment after its answer
    lines = (stack.home / "logs" / "gateway.log").read_text().splitlines()
    return Counter(row["worker"] for row in map(json.loads, lines) if row["message"] == "request")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hundred_identical_misses_make_one_upstream_call(stack: Stack, key: str, stream: bool) -> None:
    """Over two workers, half of them arriving while the first streams: one generates, all get the same whole answer."""
    before, most = served_by(stack), 0
    async with client(stack, key) as http:
        body = {"prompt": f"one two {stream}", "max_tokens": 40, "stream": stream}
        first = [asyncio.create_task(ask(http, **body)) for _ in range(MANY // 2)]
        await asyncio.sleep(0.4)
        later = [asyncio.create_task(ask(http, **body)) for _ in range(MANY // 2)]
        while not all(task.done() for task in (*first, *later)):
            most = max(most, (await asyncio.to_thread(stack.load))["running"])
            await asyncio.sleep(0.02)
        answers = [task.result() for task in (*first, *later)]
        assert (await ask(http, **body))[1] == "hit"
    assert most == 1
    assert Counter(cache for _, cache, _ in answers) == {"miss": 1, "hit": MANY - 1}
    assert len({(status, text) for status, _, text in answers}) == 1
    assert len(answers[0][2].split()) == 40
    await asyncio.to_thread(wait_until, lambda: (served_by(stack) - before).total() == MANY + 1, 5, "all are recorded")
    assert len(served_by(stack) - before) == 2, "both workers took part"


async def test_a_limit_holds_over_the_workers(stack: Stack) -> None:
    """Sixty requests at once on a limit of ten: exactly ten are answered, the others 429 with when to come back."""
    limited = create_key(stack, "--per-minute", "10", "--tokens-per-minute", "100000")["key"]
    async with client(stack, limited) as http:

        async def one(number: int) -> tuple[int, str | None, str | None]:
            body = {"model": "counting", "prompt": "one", "seed": number, "max_tokens": 1}
            async with http.post("/v1/completions", json=body) as answer:
                await answer.read()
                return answer.status, answer.headers.get("retry-after"), answer.headers.get("ratelimit")

        answers = await asyncio.gather(*(one(number) for number in range(60)))
    assert Counter(status for status, _, _ in answers) == {200: 10, 429: 50}
    assert all(limit for _, _, limit in answers)
    for status, after, limit in answers:
        if status == 429:
            assert after is not None
            assert limit is not None
            assert int(after) >= int(limit.rpartition("t=")[2])


async def test_a_revoked_key_is_refused_everywhere_within_a_second(stack: Stack) -> None:
    """A key works on both workers, and a second after it was revoked on neither."""
    made = create_key(stack)
    async with client(stack, made["key"]) as http:
        assert {(await ask(http, prompt="one", max_tokens=1))[0] for _ in range(12)} == {200}
        assert (await asyncio.to_thread(stack.cli, "keys", "revoke", made["id"])).returncode == 0
        began = awake()
        while 200 in {(await ask(http, prompt="one", max_tokens=1))[0] for _ in range(8)}:
            assert awake() - began < 1.0
        assert {(await ask(http, prompt="one", max_tokens=1))[0] for _ in range(12)} == {401}


async def test_the_admin_edge_is_apart(stack: Stack, key: str) -> None:
    """Model control is refused on the public port whatever the key, and on the admin port it takes an admin key."""
    admin = create_key(stack, "--scope", "admin")["key"]
    wanted = {("HTTP", admin): 403, ("HTTP", key): 403, ("OPS", key): 403, ("OPS", None): 401, ("OPS", admin): 200}
    for (port, credential), status in wanted.items():
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        answer = stack.request("POST", "/v2/repository/index", {}, port, headers=headers)
        assert answer[0] == status, (port, answer)
    assert b"counting" in answer[2]


async def test_a_model_that_was_exported_again_is_not_answered_from_the_cache(stack: Stack, key: str) -> None:
    """A new version of the entry, once loaded, changes the key of every answer by itself."""
    headers = {"Authorization": f"Bearer {create_key(stack, '--scope', 'admin')['key']}"}
    async with client(stack, key) as http:
        body = {"prompt": "one two three", "max_tokens": 3}
        assert [(await ask(http, **body))[1] for _ in range(2)] == ["miss", "hit"]
        version = stack.repository / "counting" / "2"
        shutil.copytree(stack.repository / "counting" / "1", version)
        manifest = json.loads((version / "manifest.json").read_text())
        (version / "manifest.json").write_text(json.dumps({**manifest, "version": "2"}))
        digest = hashlib.sha256((version / "manifest.json").read_bytes()).hexdigest()[:32]
        load = "/v2/repository/models/counting/load"
        status, _, answer = await asyncio.to_thread(stack.request, "POST", load, {}, "OPS", 30, headers)
        assert status == 200, answer
        await asyncio.to_thread(wait_until, lambda: stack.load()["digest"] == digest, 10, "the new version is loaded")
        await asyncio.sleep(1.0)  # two heartbeats: both workers have heard of it
        answers = [await ask(http, **body) for _ in range(2)]
        assert [cache for _, cache, _ in answers] == ["miss", "hit"], answers


async def test_a_killed_worker_is_replaced_and_nobody_is_refused_a_connection(stack: Stack, key: str) -> None:
    """kill -9 of one worker: every later connection is served, by two workers again."""
    gateway = psutil.Process(stack.pid("gateway"))
    before = {child.pid for child in gateway.children()}
    assert len(before) == 2
    psutil.Process(min(before)).kill()
    async with client(stack, key) as http:
        statuses = [(await ask(http, prompt=f"one {number}", max_tokens=1))[0] for number in range(20)]
    assert set(statuses) == {200}
    wait_until(lambda: len({child.pid for child in gateway.children()}) == 2, 5, "two workers again")
    assert {child.pid for child in gateway.children()} != before
