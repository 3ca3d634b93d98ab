"""How a batch asks a gateway that refuses, fails, goes away or is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ops import batchclient
from orchestrator.ops.batchclient import Asker, Gate
from orchestrator.ops.batchfile import BatchError, Line
from tests.clock import awake
from tests.orchestrator.conftest import serving, until
from tests.orchestrator.fake_triton import FakeTriton, answer, failure

from .batches import Row, do, line, rows, write


@asynccontextmanager
async def scripted(reply: Callable[[int, Row], tuple[int, dict[str, str], Any]]) -> AsyncIterator[str]:
    """A server on a real socket; `reply` gets the number of the request and its body: status, headers, body."""
    count = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        status, headers, body = reply(count, await request.json())
        return web.json_response(body, status=status, headers=headers)

    app = web.Application()
    app.router.add_post("/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def asker(url: str, **changes: Any) -> Asker:
    return Asker(**{
        "url": url, "api_key": None, "concurrency": 4, "retries": 3, "timeout_s": 10.0, "backoff_s": 0.01, **changes,
    })  # fmt: skip


async def test_a_batch_through_the_gateway(tmp_path: Path, fake: FakeTriton) -> None:
    """Chats and completions are answered, a refused request is a response with its status, and all have request ids."""
    fake.script = answer("Hola")
    fake.by_text = {"bad": [failure("it broke")]}
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hola"}]}
    lines = [
        line("a"),
        line("chat", url="/v1/chat/completions", body=chat),
        line("refused", body={"model": "m", "prompt": "x", "temperature": 9}),
        line("nobody", body={"model": "nobody", "prompt": "x"}),
        line("bad", "bad"),
        line("z"),
    ]
    async with serving(fake) as stack, asker(stack.url, retries=1) as client:
        whole, tally = await do(write(tmp_path / "in", *lines), tmp_path / "out", client)
    found = {row["custom_id"]: row for row in rows(tmp_path / "out")}
    assert whole and (tally.succeeded, tally.failed) == (3, 3)
    assert {name: row["response"]["status_code"] for name, row in found.items()} == {
        "a": 200, "chat": 200, "refused": 400, "nobody": 404, "bad": 500, "z": 200,
    }  # fmt: skip
    assert all(row["error"] is None and row["response"]["request_id"] for row in found.values())
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["content"] == "Hola"
    assert found["refused"]["response"]["body"]["error"]["param"] == "temperature"
    assert len(tally.reasons) == 3


async def test_what_may_pass_is_asked_again(tmp_path: Path, fake: FakeTriton) -> None:
    """A full queue, a lost stream and a failure of the model are followed by a success, and no line fails."""
    fake.scripts = [["close"], [failure("it broke")], [failure("it broke")]]
    fake.script = answer("Hola")
    file = write(tmp_path / "in", *(line(f"r{n}", f"prompt {n}") for n in range(4)))
    async with serving(fake, retries=0) as stack, asker(stack.url) as client:
        whole, tally = await do(file, tmp_path / "out", client)
    assert whole and (tally.succeeded, tally.failed) == (4, 0) and len(fake.requests) == 7


async def test_a_gateway_that_goes_and_comes_back(tmp_path: Path) -> None:
    """Connections that are refused or cut are retried; a gateway that stays away fails the lines and not the batch."""
    calls = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.readuntil(b"\r\n\r\n")
        if calls > 2:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    file = write(tmp_path / "in", line("a"))
    async with asker(url) as client:
        _, tally = await do(file, tmp_path / "out", client)
        assert (tally.succeeded, calls) == (1, 3)
        server.close()
        await server.wait_closed()
        whole, tally = await do(file, tmp_path / "out", client, overwrite=True)
    (row,) = rows(tmp_path / "out")
    assert whole and tally.failed == 1 and row["response"] is None
    assert row["error"]["code"] == "connection_failed" and row["error"]["line"] == 1


async def test_a_slow_answer_ends_in_time(tmp_path: Path, fake: FakeTriton) -> None:
    """--timeout ends a line whose answer does not come, and the gateway gives up its stream; the others go on."""
    fake.by_text = {"slow": [3600.0]}
    file = write(tmp_path / "in", line("slow", "slow"), *(line(f"r{n}", f"{n}") for n in range(5)))
    async with serving(fake, stall_s=60.0) as stack, asker(stack.url, timeout_s=0.4, concurrency=2) as client:
        began = awake()
        whole, tally = await do(file, tmp_path / "out", client)
        assert awake() - began < 3
        await until(lambda: fake.running == 0)
    found = rows(tmp_path / "out")
    assert whole and (tally.succeeded, tally.failed) == (5, 1)
    assert found[0]["error"]["code"] == "timeout"


async def test_a_limit_is_waited_for_without_hammering(tmp_path: Path) -> None:
    """A server that takes 8 requests and then says 429 for a second is left alone by all workers for that second."""
    refused_at: list[float] = []
    asked_at: list[float] = []

    def reply(number: int, body: Row) -> tuple[int, dict[str, str], Any]:
        now = time.monotonic()
        asked_at.append(now)
        if number > 8 and (not refused_at or now - refused_at[0] < 1.0):
            refused_at.append(now)
            return 429, {"Retry-After": "1"}, {"error": {"message": "used up"}}
        return 200, {}, {}

    file = write(tmp_path / "in", *(line(f"r{n}") for n in range(30)))
    async with scripted(reply) as url, asker(url, concurrency=6, retries=0) as client:
        whole, tally = await do(file, tmp_path / "out", client)
    assert whole and (tally.succeeded, tally.failed) == (30, 0)
    assert 1 <= len(refused_at) <= 6, "only what was under way was refused"
    assert not [at for at in asked_at if refused_at[-1] < at < refused_at[-1] + 0.9]


async def test_a_limit_that_ends_too_late_ends_the_run(tmp_path: Path) -> None:
    """A day's limit that is used up loses nothing: the run ends with a hint and the next one goes on."""
    open_again = False

    def reply(number: int, body: Row) -> tuple[int, dict[str, str], Any]:
        late = number > 3 and not open_again
        return (429, {"Retry-After": "7200"}, {"error": {"message": "used up"}}) if late else (200, {}, {})

    file = write(tmp_path / "in", *(line(f"r{n}") for n in range(9)))
    async with scripted(reply) as url, asker(url, concurrency=1) as client:
        with pytest.raises(BatchError, match="used up for 7200 s"):
            await do(file, tmp_path / "out", client)
        open_again = True
        whole, tally = await do(file, tmp_path / "out", client)
    assert whole and (tally.succeeded, tally.skipped) == (9, 3)


async def test_a_missing_key_costs_no_line(tmp_path: Path) -> None:
    """A 401 ends the run with a hint instead of being every line's answer; with a key the same command goes on."""
    file = write(tmp_path / "in", *(line(f"r{n}") for n in range(9)))
    async with (
        scripted(lambda number, body: (401 if number < 2 else 200, {}, {})) as url,
        asker(url, concurrency=1) as client,
    ):
        with pytest.raises(BatchError, match="asks for an API key"):
            await do(file, tmp_path / "out", client)
        whole, tally = await do(file, tmp_path / "out", client)
    assert whole and tally.succeeded == 9


@pytest.mark.parametrize(
    ("status", "retries", "tries"), [(503, 2, 3), (500, 0, 1), (408, 1, 2), (400, 5, 1), (404, 5, 1), (307, 5, 1)]
)
async def test_retries_are_bounded(tmp_path: Path, status: int, retries: int, tries: int) -> None:
    """What may pass is tried 1 + retries times, anything else once; the last answer is the line's."""
    count = 0

    def reply(number: int, body: Row) -> tuple[int, dict[str, str], Any]:
        nonlocal count
        count = number
        return status, {"X-Request-Id": f"r{number}", "Location": "/elsewhere"}, {"error": {"message": "no"}}

    async with scripted(reply) as url, asker(url, retries=retries) as client:
        await do(write(tmp_path / "in", line("a")), tmp_path / "out", client)
    (row,) = rows(tmp_path / "out")
    assert count == tries and row["error"] is None
    assert row["response"] == {
        "status_code": status, "request_id": f"r{tries}", "body": {"error": {"message": "no"}},
    }  # fmt: skip


async def test_the_key_is_sent_and_not_shown() -> None:
    """settings.api_key goes out as a bearer token, and no repr has it."""
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("authorization"))
        return web.json_response({})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"127.0.0.1:{runner.addresses[0][1]}/prefix/"
    async with asker(url, api_key="sk-secret") as client:
        await client.ask(Line(1, "a", "/v1/completions", b"{}"), "id")
        await batchclient.slots(url, "sk-secret")
        assert "secret" not in repr(client)
    await runner.cleanup()
    assert seen == ["Bearer sk-secret"] * 2


async def test_slots_are_the_gateways(fake: FakeTriton) -> None:
    """As many lines at once as the models have slots; a server that does not tell is asked little at a time."""
    async with serving(fake) as stack:
        assert await batchclient.slots(stack.url, None) == 4
        fake.beat["slots"] = 500
        gateway = stack.gateway
        await until(lambda: bool((beat := gateway.served[0].beat) and beat.slots == 500))
        assert await batchclient.slots(stack.url, None) == 64
    async with scripted(lambda number, body: (200, {}, {})) as url:
        assert await batchclient.slots(url, None) == batchclient.OTHER_SLOTS
    with pytest.raises(BatchError, match="does not answer"):
        await batchclient.slots(url, None)


@settings(max_examples=40)
@given(st.integers(1, 8), st.lists(st.booleans(), min_size=1, max_size=40))
def test_the_gate_bounds_and_never_shuts_for_good(most: int, refusals: list[bool]) -> None:
    """Never more than `most` inside, never none for ever, whatever is answered and refused."""
    inside = highest = 0

    async def one(gate: Gate, refused: bool) -> None:
        nonlocal inside, highest
        async with gate.passing():
            inside += 1
            highest = max(highest, inside)
            await asyncio.sleep(0)
            inside -= 1
            gate.refused(0.0005) if refused else gate.answered()

    async def all_of_them() -> None:
        gate = Gate(most)
        async with asyncio.timeout(10):
            await asyncio.gather(*(one(gate, refused) for refused in refusals))

    asyncio.run(all_of_them())
    assert 1 <= highest <= most
