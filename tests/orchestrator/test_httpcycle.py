"""One request and its answer on a real connection: framing, what an application does wrong, and who is gone."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator.api.http import Receive, Scope, Send

from .conftest import until
from .test_server import Client, on_uvloop, serving

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]
GET = b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nhost: h\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"


def application(handler: Handler) -> Handler:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await handler(scope, receive, send)

    return app


async def exchanged(handler: Handler, *sent: bytes) -> bytes:
    """All that the server says, until it closes the connection, to a client that sends this piece by piece."""
    async with serving(app=application(handler)) as running:
        client = await running.connect()
        for data in sent:
            client.send(data)
            await asyncio.sleep(0.02)
        async with asyncio.timeout(5):
            return await client.reader.read()


def answering(status: int, *body: bytes, headers: Any = ()) -> Handler:
    """Sends a start and these pieces of a body, the last of them as such."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for piece in body[:-1]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": body[-1]})

    return handler


THREE = [(b"content-length", b"3")]
CHUNKS = b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("handler", "request_", "answer"),
    [
        (answering(200, b"abc", headers=THREE), LAST, b"content-length: 3\r\nconnection: close\r\n\r\nabc"),
        (answering(200, b"abc", headers=THREE), HEAD + LAST, b"content-length: 3\r\n\r\nHTTP/1.1 200 OK\r\ncontent"),
        (answering(200, b"a", b"", b"bc"), LAST, b"connection: close\r\n" + CHUNKS),
        (answering(200, b"a", b"bc", b""), LAST, b"connection: close\r\n" + CHUNKS),
        (answering(204, b""), LAST, b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n"),
        (answering(304, b""), GET + LAST, b"HTTP/1.1 304 Not Modified\r\n\r\nHTTP/1.1 304 Not Modified\r\nconnection"),
        (answering(413, b"", headers=[(b"connection", b"close")]), GET, b"413 Request Entity Too Large\r\nconnection"),
        (answering(599, b""), LAST, b"HTTP/1.1 599 \r\n"),
        (answering(200, b"abc", headers=THREE), b"GET / HTTP/1.0\r\n\r\n", b"3\r\nconnection: close\r\n\r\nabc"),
    ],
    ids=["whole", "HEAD", "chunks", "chunks, empty end", "204", "304", "close", "no such status", "1.0"],
)
@on_uvloop
async def test_an_answer_is_framed(handler: Handler, request_: bytes, answer: bytes) -> None:
    """By its length or in chunks, never with a body where there may be none; the last one says that it is."""
    assert answer in await exchanged(handler, request_)


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\rb", b"a\nb", b"a\0b", b"\x7f", b"a\r\n"])
@pytest.mark.parametrize("length", [[], THREE])
@on_uvloop
async def test_no_header_is_smuggled_into_an_answer(value: bytes, length: list[tuple[bytes, bytes]]) -> None:
    """A value with a character that none may have is never sent: the client gets a 500 that is whole."""
    said = await exchanged(answering(200, b"abc", headers=[*length, (b"x-echo", value)]), GET)
    assert said.startswith(b"HTTP/1.1 500 ") and said.endswith(b"\r\n\r\nInternal Server Error")
    assert b"x-echo" not in said and b"chunked" not in said


async def _raise(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError


async def _say_nothing(scope: Scope, receive: Receive, send: Send) -> None: ...


async def _begin(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"abc", "more_body": True})


async def _begin_and_raise(scope: Scope, receive: Receive, send: Send) -> None:
    await _begin(scope, receive, send)
    raise ValueError


@pytest.mark.parametrize(
    ("handler", "start", "end"),
    [
        (_raise, b"HTTP/1.1 500 ", b"\r\nInternal Server Error"),
        (_say_nothing, b"HTTP/1.1 500 ", b"\r\nInternal Server Error"),
        (answering(200, b"abcd", headers=THREE), b"HTTP/1.1 500 ", b"\r\nInternal Server Error"),
        (answering(200, b"ab", headers=THREE), b"HTTP/1.1 500 ", b"\r\nInternal Server Error"),
        (_begin, b"HTTP/1.1 200 ", b"3\r\nabc\r\n"),
        (_begin_and_raise, b"HTTP/1.1 200 ", b"3\r\nabc\r\n"),
    ],
)
@on_uvloop
async def test_an_application_that_fails(handler: Handler, start: bytes, end: bytes) -> None:
    """What it has not begun is a 500; what it has begun is sent so far and cut off: nobody takes that for whole."""
    said = await exchanged(handler, GET)
    assert said.startswith(start) and said.endswith(end)


async def _read(scope: Scope, receive: Receive, send: Send) -> None:
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message["body"])
        more = message["more_body"]
    await answering(200, b"%d %d %r" % (len(pieces), len(b"".join(pieces)), dict(scope["headers"])))(
        scope, receive, send
    )


@on_uvloop
async def test_a_body_comes_in_one_piece_or_several() -> None:
    """One that came with its head is one piece; small chunks of one packet are put together."""
    head = b"POST / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n"
    assert b"\r\n1 5 {" in await exchanged(_read, head + b"content-length: 5\r\n\r\n12345")
    assert b"\r\n2 5 {" in await exchanged(_read, head + b"content-length: 5\r\n\r\n12", b"345")
    chunks = b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n"
    assert b" 10000 {" in await exchanged(_read, head + b"transfer-encoding: chunked\r\n\r\n" + chunks)


@on_uvloop
async def test_a_trailer_is_no_part_of_the_head() -> None:
    """Fields after a body (RFC 9110, 6.5.1) do not become headers, though they came in one packet with the head."""
    head = b"POST / HTTP/1.1\r\nhost: h\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    said = await exchanged(_read, head + b"1\r\nx\r\n0\r\nx-forwarded-for: 10.0.0.1\r\nauthorization: x\r\n\r\n")
    assert b"host" in said and b"authorization" not in said and b"x-forwarded-for" not in said


@on_uvloop
async def test_who_expects_to_be_told_to_go_on() -> None:
    """`100 Continue` is said once the body is asked for (RFC 9110, 10.1.1), and not by who answers without it."""
    head = b"POST / HTTP/1.1\r\nhost: h\r\nconnection: close\r\nexpect: 100-Continue\r\ncontent-length: 2\r\n\r\n"
    assert (await exchanged(_read, head, b"ab")).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert (await exchanged(answering(200, b"abc"), head)).startswith(b"HTTP/1.1 200 OK\r\n")


async def read_once(client: Client) -> bytes:
    async with asyncio.timeout(5):
        return await client.reader.read(1 << 16)


@on_uvloop
async def test_what_comes_in_one_turn_leaves_together() -> None:
    """A stream's head goes with its first pieces, the next ones at once, and the last one behind what is held."""
    more = asyncio.Event()

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"a", b"b"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await more.wait()
        await send({"type": "http.response.body", "body": b"c", "more_body": True})
        await send({"type": "http.response.body", "body": b"d"})

    async with serving(app=application(handler)) as running:
        client = await running.connect()
        client.send(GET)
        first = await read_once(client)
        assert first.startswith(b"HTTP/1.1 200 OK\r\n") and first.endswith(b"\r\n\r\n1\r\na\r\n1\r\nb\r\n")
        more.set()
        assert await read_once(client) == b"1\r\nc\r\n1\r\nd\r\n0\r\n\r\n"


@pytest.mark.parametrize("how", ["hangs up", "takes too long"])
@on_uvloop
async def test_an_application_hears_that_its_client_is_gone(how: str) -> None:
    """By the call that it left, once the client hangs up or the time that it gave is over; never after it took it back.

    Nothing of the request is left then, without the garbage collector.
    """
    gone, took_back = asyncio.Event(), asyncio.Event()
    scopes: list[Any] = []

    class Told:
        def __call__(self) -> None:
            gone.set()

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        told = Told()
        scopes.append(weakref.ref(told))
        when_gone = scope["extensions"]["truthgpt.when_gone"]["call"]
        when_gone(told, 0.0)
        when_gone(told, None)
        await asyncio.sleep(0.7)  # longer than it takes until connections are looked at
        took_back.set()
        assert not gone.is_set()
        when_gone(told, 60.0 if how == "hangs up" else 0.1)
        when_gone(print, None)  # as the request before this one, which ends late
        await gone.wait()
        when_gone(told, None)

    gc.collect()
    gc.disable()
    try:
        async with serving(app=application(handler)) as running:
            client = await running.connect()
            client.send(GET)
            await took_back.wait()
            await asyncio.sleep(0)
            if how == "hangs up":
                client.writer.transport.abort()
            async with asyncio.timeout(2):
                await gone.wait()
            await until(lambda: not running.server.server_state.tasks)
            assert scopes[0]() is None
    finally:
        gc.enable()
