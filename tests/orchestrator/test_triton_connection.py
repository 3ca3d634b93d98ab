"""The HTTP client under Triton's: what is kept, what is given up, and what ends a wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.triton.connection import HIGH_BYTES, ConnectionFailed, Pool

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n"


class Server:
    """Answers each request of each connection with the next of `script`, piece by piece; None hangs up."""

    def __init__(self, script: list[list[bytes | None]]) -> None:
        self.script, self.connections, self.requests, self.hung_up = script, 0, 0, 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.requests += 1
                for piece in self.script[min(self.requests, len(self.script)) - 1]:
                    if piece is None:
                        return
                    writer.write(piece)
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hung_up += 1
        finally:
            writer.close()


@asynccontextmanager
async def serving(script: list[list[bytes | None]]) -> AsyncIterator[tuple[Server, Pool]]:
    server = Server(script)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    pool = Pool("127.0.0.1", listening.sockets[0].getsockname()[1], 1.0)
    try:
        yield server, pool
    finally:
        pool.close()
        listening.close()


def soon(seconds: float = 2.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def whole(pool: Pool) -> tuple[int, bytes]:
    answer = await pool.request("GET", "/x", None, {})
    try:
        await answer.begun(soon())
        body = b""
        while data := await answer.read(soon()):
            body += data
        return answer.status, body
    finally:
        answer.close()


async def test_a_connection_is_kept_for_the_next_request() -> None:
    """Requests one after another share a connection; two at once need two."""
    async with serving([[WHOLE]]) as (server, pool):
        assert [await whole(pool) for _ in range(3)] == [(200, b"ok")] * 3
        assert server.connections == 1
        await asyncio.gather(whole(pool), whole(pool))
        assert server.connections == 2


@pytest.mark.parametrize("first", [b"HTTP/1.1 200 OK\r\nconnection: close\r\n", b"HTTP/1.0 200 OK\r\n"])
async def test_a_server_that_closes_is_connected_to_anew(first: bytes) -> None:
    """A response that ends its connection is not the last one of the pool."""
    async with serving([[first + b"content-length: 2\r\n\r\nok"]]) as (server, pool):
        assert [await whole(pool) for _ in range(2)] == [(200, b"ok")] * 2
        assert server.connections == 2


async def test_a_kept_connection_that_dies_is_forgotten() -> None:
    """What the server closed while it was idle is not used again."""
    async with serving([[WHOLE, None], [WHOLE]]) as (server, pool):
        assert await whole(pool) == (200, b"ok")
        while pool.connections:  # noqa: ASYNC110  the other end closes
            await asyncio.sleep(0.001)
        assert await whole(pool) == (200, b"ok")
        assert server.connections == 2


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 90), max_size=8))
def test_a_chunked_body_cut_anywhere(cuts: list[int]) -> None:
    """However the bytes arrive, status, headers and body are the same."""
    text = CHUNKED + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})

    async def run() -> None:
        pieces: list[bytes | None] = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
        async with serving([pieces]) as (_, pool):
            assert await whole(pool) == (200, b"hello world")
            answer = await pool.request("POST", "/x", b"", {"a": "b"})
            await answer.begun(soon())
            assert answer.headers == {"transfer-encoding": "chunked", "x-a": "b"}
            answer.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("script", "why"),
    [([b"nonsense\r\n\r\n"], "not HTTP"), ([CHUNKED, b"5\r\nhel", None], "closed"), ([None], "closed")],
)
async def test_what_is_lost_is_an_error(script: list[bytes | None], why: str) -> None:
    """Bytes that are not HTTP, and an answer that is cut off, raise ConnectionFailed and never end well."""
    async with serving([script]) as (_, pool):
        with pytest.raises(ConnectionFailed, match=why):
            await whole(pool)


async def test_nobody_listens() -> None:
    """A refused connection is ConnectionFailed as well, and so is one after the pool was closed."""
    async with serving([[WHOLE]]) as (_, pool):
        pass
    with pytest.raises(ConnectionFailed):
        await Pool("127.0.0.1", pool._port, 1.0).request("GET", "/", None, {})
    with pytest.raises(ConnectionFailed, match="closed"):
        await pool.request("GET", "/", None, {})


async def test_a_wait_ends_at_its_deadline_whatever_the_one_before_was() -> None:
    """Each wait has a deadline of its own, earlier or later than the last one's, and a late reader still reads."""
    async with serving([[CHUNKED, b"1\r\na\r\n"]]) as (_, pool):
        answer = await pool.request("GET", "/", None, {})
        await answer.begun(soon())
        assert await answer.read(soon(30)) == b"a"
        loop = asyncio.get_running_loop()
        for seconds in (0.05, 0.02, 0.08):
            began = loop.time()
            with pytest.raises(TimeoutError):
                await answer.read(began + seconds)
            assert loop.time() - began >= seconds - 0.002
        with pytest.raises(TimeoutError):
            await answer.read(loop.time() - 1)
        answer.close()


async def test_a_failure_ends_a_wait_at_once_and_every_later_one() -> None:
    """What `fail` is given first is raised where the answer is waited for, and stays."""
    async with serving([[CHUNKED]]) as (_, pool):
        answer = await pool.request("GET", "/", None, {})
        await answer.begun(soon())
        reading = asyncio.create_task(answer.read(soon(60)))
        await asyncio.sleep(0)
        answer.fail(ValueError("first"))
        answer.fail(ValueError("second"))
        for wait in (reading, answer.read(soon())):
            with pytest.raises(ValueError, match="first"):
                await wait
        answer.close()
        assert not pool._idle


async def test_closing_before_the_end_hangs_up() -> None:
    """The server of an answer that is closed too early sees its client leave."""
    async with serving([[CHUNKED, b"1\r\na\r\n"]]) as (server, pool):
        answer = await pool.request("GET", "/", None, {})
        assert await answer.read(soon()) == b"a"
        answer.close()
        async with asyncio.timeout(2):
            while not server.hung_up:  # noqa: ASYNC110  the other end notices
                await asyncio.sleep(0.001)


async def test_an_answer_finished_before_its_end_keeps_its_connection() -> None:
    """Who has read all that matters does not wait for the end; the connection is used again once that has come."""
    async with serving([[CHUNKED, b"1\r\na\r\n", b"0\r\n\r\n"], [WHOLE]]) as (server, pool):
        answer = await pool.request("GET", "/", None, {})
        assert await answer.read(soon()) == b"a"
        answer.finish()
        async with asyncio.timeout(2):
            while not pool._idle:  # noqa: ASYNC110  the end is on its way
                await asyncio.sleep(0.001)
        assert await whole(pool) == (200, b"ok")
        assert server.connections == 1


async def test_what_nobody_reads_is_bounded() -> None:
    """A reader that does not read stops the server after some buffers, and gets everything in the end."""
    size = 64 * HIGH_BYTES
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size
    async with serving([[head, b"x" * size]]) as (_, pool):
        answer = await pool.request("GET", "/", None, {})
        await answer.begun(soon())
        await asyncio.sleep(0.1)
        assert answer._size < 8 * HIGH_BYTES
        read = 0
        while data := await answer.read(soon()):
            read += len(data)
        assert read == size
        answer.close()
        assert pool._idle
