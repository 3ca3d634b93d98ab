"""HTTP as it goes over sockets: connections that are kept, moments, and servers that do all of it wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bench import httpwire
from orchestrator.bench.answers import Answer, BenchError, Fault, HttpReader
from orchestrator.bench.httpwire import Connection, HttpWire
from orchestrator.bench.plan import Prompt, Target
from tests.e2e.stack import free_ports

from .servers import (
    END,
    ROLE,
    STREAM,
    Exchange,
    Handler,
    Served,
    answered,
    chat,
    chats,
    chunk,
    delta,
    event,
    good,
    load,
    serving,
    sized,
    usage,
)  # fmt: skip

PROMPT = Prompt("hello")


async def ask(wire: HttpWire, timeout_s: float = 20.0) -> Answer:
    answer = Answer(8)
    async with asyncio.timeout(timeout_s):
        await wire.ask(PROMPT, 8, answer)
    return answer


async def failing(handler: Handler, **more: Any) -> Fault:
    """The fault that one request to such a server has."""
    async with serving(handler) as served:
        wire = HttpWire(chats(served.url, **more), load())
        with pytest.raises(Fault) as caught:
            await ask(wire)
        await wire.close()
        return caught.value


def raw(*parts: bytes, close: bool = True) -> Handler:
    """What sends these bytes and closes."""

    async def handler(exchange: Exchange) -> None:
        await exchange.send(*parts)
        exchange.close = close

    return handler


async def test_a_connection_is_kept_and_the_request_is_whole() -> None:
    """Three requests go over one connection, each with the key, the headers and no-cache."""
    async with serving(good) as served:
        wire = HttpWire(chats(served.url, api_key="the-key", headers=(("X-Team", "a"), ("Accept", "*/*"))), load())
        for _ in range(3):
            assert (await ask(wire)).tokens == 2
        await wire.close()
    head = served.asked[0].head
    assert served.connections == 1 and head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    lines = head.strip().split("\r\n")[1:]
    for line in ("Authorization: Bearer the-key", "Cache-Control: no-cache", "X-Team: a", "Accept: */*"):
        assert line in lines
    assert len({line.partition(":")[0].lower() for line in lines}) == len(lines)
    assert served.asked[0].json["messages"] == [{"role": "user", "content": "hello"}]


async def test_a_cache_may_be_allowed_and_a_header_replaced() -> None:
    """--allow-cache asks for nothing; a header of the user's own stands in place of ours."""
    async with serving(good) as served:
        wire = HttpWire(
            chats(served.url, allow_cache=True, api_key="key", headers=(("authorization", "Basic x"),)), load()
        )
        await ask(wire)
        await wire.close()
    head = served.asked[0].head.lower()
    assert "cache-control" not in head and "authorization: basic x\r\n" in head and "bearer" not in head


async def test_a_connection_closed_while_idle_is_not_used_again() -> None:
    """The server closed it meanwhile: the next request opens another and nobody sees an error."""

    async def once(exchange: Exchange) -> None:
        await good(exchange)
        exchange.close = True

    async with serving(once) as served:
        wire = HttpWire(chats(served.url), load())
        for _ in range(3):
            await ask(wire)
            await asyncio.sleep(0.05)
        await wire.close()
    assert served.connections == 3


async def test_a_connection_that_was_idle_for_long_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a server might close it, it is left."""
    async with serving(good) as served:
        wire = HttpWire(chats(served.url), load())
        await ask(wire)
        monkeypatch.setattr(httpwire, "IDLE_S", 0.0)
        await ask(wire)
        await wire.close()
    assert served.connections == 2


async def test_a_connection_that_talks_unasked_is_left() -> None:
    """What comes between two exchanges belongs to neither."""

    async def chatty(exchange: Exchange) -> None:
        await good(exchange)
        if exchange.number == 0:
            await asyncio.sleep(0.02)
            await exchange.send(answered("wrong"))

    async with serving(chatty) as served:
        wire = HttpWire(chats(served.url), load())
        await ask(wire)
        await asyncio.sleep(0.1)
        assert (await ask(wire)).tokens == 2
        await wire.close()
    assert served.connections == 2


async def test_an_error_in_order_keeps_the_connection() -> None:
    """A 429 is an answer like any other to the connection it came over."""

    async def limited(exchange: Exchange) -> None:
        if exchange.number == 0:
            body = b'{"error": {"message": "slow down", "type": "rate"}}'
            return await exchange.send(sized(body, "429 Too Many Requests"))
        return await good(exchange)

    async with serving(limited) as served:
        wire = HttpWire(chats(served.url), load())
        with pytest.raises(Fault, match="slow down") as caught:
            await ask(wire)
        assert caught.value.kind == "http_429" and (await ask(wire)).tokens == 2
        await wire.close()
    assert served.connections == 1


async def test_a_first_token_is_stamped_before_anything_is_parsed() -> None:
    """However long a reader takes over the head, the body that came with it has the moment of the read."""
    moments: list[float] = []

    class Slow(HttpReader):
        kind = "text/event-stream"

        def head(self, status: int, content_type: str, encoding: str) -> None:
            moments.append(time.perf_counter())
            time.sleep(0.05)

        def part(self, data: bytes, now: float) -> None:
            moments.append(now)

        def whole(self, now: float) -> None:
            moments.append(now)

    async with serving(good) as served:
        loop, port = asyncio.get_running_loop(), int(served.url.rpartition(":")[2])
        _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
        reader = Slow(Answer(8))
        reader._status = 200
        await connection.ask(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", reader)
        connection.abort()
    head, *others = moments
    assert others and all(now < head for now in others)


async def test_tokens_are_stamped_when_they_come() -> None:
    """Between two events the server waits 80 ms: the role's does not count as first, the usage's not as last."""
    parts = [
        STREAM + chunk(event(ROLE)),
        *(chunk(event(one)) for one in (delta("a"), delta("b"), delta(finish="stop"))),
    ]

    async def paced(exchange: Exchange) -> None:
        await exchange.send(*parts, chunk(event(usage(2)) + event(b"[DONE]")) + END, pause_s=0.08)

    async with serving(paced) as served:
        wire, began = HttpWire(chats(served.url), load()), time.perf_counter()
        answer = await ask(wire)
        ended = time.perf_counter()
        await wire.close()
    assert answer.first - began >= 0.075 and ended - answer.last >= 0.15
    ((gap, came),) = answer.gaps
    assert gap >= 0.06 and came == 1


async def test_a_large_answer_in_one_read_is_no_large_head() -> None:
    """An embedding's 200 kB come together with the head, or in the middle of its end."""
    body = b'{"data": [{"embedding": [' + b"0.25, " * 40_000 + b"1]}]}"
    target: dict[str, Any] = {"endpoint": "embeddings", "task": "encode"}

    async def halved(exchange: Exchange) -> None:
        whole = sized(body)
        at = whole.index(b"\r\n\r\n") + 3 if exchange.number else 0
        await exchange.send(whole[:at], whole[at:], pause_s=0.02)

    async with serving(halved) as served:
        wire = HttpWire(chats(served.url, **target), load())
        for _ in range(2):
            answer = Answer(0)
            await wire.ask(PROMPT, 8, answer)
            assert answer.first
        await wire.close()


async def test_early_hints_come_before_the_answer() -> None:
    """A 1xx is no answer; the one behind it is."""

    async def hinting(exchange: Exchange) -> None:
        hint = b"HTTP/1.1 103 Early Hints\r\nlink: <a>\r\n\r\n"
        await exchange.send(hint * 2, answered(), pause_s=0.02)

    async with serving(hinting) as served:
        wire = HttpWire(chats(served.url), load())
        assert (await ask(wire)).tokens == 2 and (await ask(wire)).tokens == 2
        await wire.close()
    assert served.connections == 1


async def test_a_body_may_end_with_its_connection() -> None:
    """HTTP/1.0's way, with neither a length nor chunks."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"

    async def old(exchange: Exchange) -> None:
        await exchange.send(head + chat("one", " two"))
        exchange.close = True

    async with serving(old) as served:
        wire = HttpWire(chats(served.url), load())
        assert (await ask(wire)).tokens == 2 and (await ask(wire)).tokens == 2
        await wire.close()
    assert served.connections == 2


async def test_chunks_may_be_odd() -> None:
    """Each byte a chunk of its own, extensions, leading zeros and trailers: it is all HTTP."""
    body = b"".join(b"0001;name=value\r\n%c\r\n" % byte for byte in chat("one", " two"))

    async def odd(exchange: Exchange) -> None:
        await exchange.send(STREAM + body + b"0\r\nX-Trailer: a\r\n\r\n")

    async with serving(odd) as served:
        wire = HttpWire(chats(served.url), load())
        assert (await ask(wire)).tokens == 2 and (await ask(wire)).tokens == 2
        await wire.close()


OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (raw(), "cut"), (raw(b"HTTP/1.1 200 OK\r\ncontent-ty"), "cut"), (raw(STREAM), "cut"),
        (raw(STREAM + chunk(chat("one"))), "cut"), (raw(OK + b"content-length: 500\r\n\r\n" + chat("one")), "cut"),
        (raw(OK + b"\r\n" + event(delta("one"))), "no_end"), (raw(b"\x16\x03\x01 garbage\r\n\r\n"), "nonsense"),
        (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "nonsense"), (raw(STREAM + b"zz\r\nabc"), "nonsense"),
        (raw(STREAM + b"-5\r\nabc"), "nonsense"), (raw(STREAM + b"f" * 17 + b"\r\nabc"), "nonsense"),
        (raw(OK + b"content-length: -1\r\n\r\n"), "nonsense"),
        (raw(OK + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\nabc"), "nonsense"),
        (raw(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nabc"), "nonsense"),
        (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "http_204"), (raw(b"HTTP/1.1 302 Found\r\nlocation: /\r\n"
                                                                    b"content-length: 0\r\n\r\n"), "http_302"),
        (raw(sized(b"<html>", kind="text/html")), "content_type"), (raw(sized(b"{}")), "content_type"),
        (raw(sized(b'{"error": {"message": "x"}}', kind="text/event-stream")), "no_end"),
        (raw(sized(event({"error": {"message": "x"}}), kind="text/event-stream")), "in_band"),
        (raw(sized(b"\x1f\x8b", kind="text/event-stream", more="content-encoding: gzip\r\n")), "content_encoding"),
        (raw(sized(b"oops", "500 Oh")), "http_500"), (raw(b"HTTP/1.1 503 Busy\r\n\r\nbusy"), "http_503"),
        (raw(STREAM + chunk(event(delta("a")) + event({"error": {"message": "x"}})) + END), "in_band"),
        (raw(STREAM + chunk(event(delta("a"))) + END), "no_end"),
        (raw(STREAM + chunk(event(b"[DONE]")) + END), "no_tokens"),
        (raw(STREAM + chunk(event(delta("a")) + event(usage(99)) + event(b"[DONE]")) + END), "wrong_usage"),
    ],
)  # fmt: skip
async def test_a_bad_server_is_a_fault_with_its_kind(handler: Handler, kind: str) -> None:
    """Cut, garbled, refused, lying: none hangs, none is an answer, each has a sentence."""
    fault = await failing(handler)
    assert fault.kind == kind and str(fault)


async def test_nobody_there_is_said_at_once() -> None:
    """A refused connection, and a name that is none."""
    for url in (f"http://127.0.0.1:{free_ports(1)[0]}", "http://no-such-host.invalid", f"http://{'a' * 64}.b:1"):
        with pytest.raises(Fault) as caught:
            await ask(HttpWire(chats(url), load()))
        assert caught.value.kind == "connect"


async def test_a_server_without_tls_is_no_tls_server() -> None:
    """What it says instead of a handshake is a fault of its own kind."""

    async def plain(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Fault) as caught:
            await ask(HttpWire(chats(f"https://127.0.0.1:{port}"), load()))
        assert caught.value.kind == "tls"


def test_certificates_that_are_none(tmp_path: Path) -> None:
    """A missing file and one that holds something else."""
    (tmp_path / "text").write_text("no certificate")
    for name in ("missing", "text"):
        with pytest.raises(BenchError, match=name) as caught:
            HttpWire(Target("https://host", "openai", "demo", ca_file=str(tmp_path / name)), load())
        assert "--ca-file" in caught.value.hint


def endless(first: bytes, part: Callable[[], bytes], sent: list[int]) -> Handler:
    """What sends without end, and counts its bytes."""

    async def handler(exchange: Exchange) -> None:
        await exchange.send(first)
        while sent[0] < 400 << 20:
            data = part()
            sent[0] += len(data)
            await exchange.send(data)

    return handler


@pytest.mark.parametrize(
    ("first", "part", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x-header: value\r\n" * 1000, "too_large"),
        (b"HTTP/1.1 200 OK\r\nx: ", b"v" * 16_000, "too_large"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" * 300, "too_large"),
        (STREAM, chunk(b"x" * 65_000), "too_large"), (STREAM, chunk(b"data: x\n" * 8000), "too_large"),
        (STREAM, chunk(event(delta("a")) * 100), "endless"), (STREAM, chunk(b": ping\n\n" * 8000), "too_large"),
        (STREAM, chunk(event(ROLE) * 500), "too_large"), (STREAM + b"0\r\n", b"x-trailer: a\r\n" * 4000, "too_large"),
        (b"HTTP/1.1 500 Oh\r\ntransfer-encoding: chunked\r\n\r\n", chunk(b"x" * 65_000), "http_500"),
    ],
)  # fmt: skip
async def test_what_never_ends_is_ended(first: bytes, part: bytes, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers, hints, events, comments, trailers, errors without end: little of it is taken."""
    monkeypatch.setattr(httpwire, "MAX_BYTES", 4 << 20)
    sent = [0]
    fault = await failing(endless(first, lambda: part, sent))
    assert fault.kind == kind and sent[0] < 30 << 20


async def test_a_body_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an answer in one piece no more is kept than one may have."""
    monkeypatch.setattr(HttpReader, "limit_bytes", 2 << 20)
    sent = [0]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    fault = await failing(endless(head, lambda: chunk(b" " * 65_000), sent), stream=False)
    assert fault.kind == "too_large" and sent[0] < 30 << 20


async def test_a_request_that_is_given_up_leaves_nothing_behind() -> None:
    """Its connection is closed, and the next request has one of its own."""

    async def slow(exchange: Exchange) -> None:
        if exchange.number == 0:
            return await asyncio.sleep(30)
        return await good(exchange)

    served: Served
    async with serving(slow) as served:
        wire = HttpWire(chats(served.url), load())
        with pytest.raises(TimeoutError):
            await ask(wire, 0.1)
        assert (await ask(wire)).tokens == 2
        await wire.close()
    assert served.connections == 2
