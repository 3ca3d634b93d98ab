"""The server against clients that mean no good or do nothing, on real sockets."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec

import pytest
import uvloop

from orchestrator import hardening
from orchestrator import server as server_module
from orchestrator.api.http import Receive, Scope, Send
from orchestrator.hardening import Hardened
from orchestrator.server import BindError, Server, configure, listen, reserve, url
from orchestrator.settings import Settings
from tests.e2e.stack import free_ports

from .conftest import until

CHUNKED = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
P = ParamSpec("P")
GET = b"GET /?%b HTTP/1.1\r\nhost: h\r\n\r\n"


class Application:
    """Echoes query and length of the body after `delay_s`; /stream writes for ever; /early does not read."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.written = 0
        self.disconnects = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        await asyncio.sleep(self.delay_s)
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": bytes(8192), "more_body": True})
                self.written += 8192
                await asyncio.sleep(0)
        size, more = 0, scope["path"] != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return
            size += len(message["body"])
            more = message["more_body"]
        query = scope["query_string"].decode()[:10]
        body = json.dumps({"query": query, "size": size, "client": scope["client"][0]}).encode()
        headers = [(b"content-length", b"%d" % len(body))]
        if query == "close":
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@dataclass
class Client:
    """One connection, spoken to byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON body of the next answer."""
        async with asyncio.timeout(5):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = head.strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), headers, json.loads(body)

    async def ended(self, within_s: float = 5.0) -> bool:
        """Whether the server closes the connection without another byte."""
        async with asyncio.timeout(within_s):
            return await self.reader.read() == b""


@dataclass
class Running:
    app: Application
    server: Server
    port: int
    clients: list[Client]

    async def connect(self, limit: int = 2**16) -> Client:
        self.clients.append(Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=limit)))
        return self.clients[-1]

    @property
    def connections(self) -> list[Hardened]:
        return [c for c in self.server.server_state.connections if isinstance(c, Hardened)]


@asynccontextmanager
async def serving(settings: Settings | None = None, app: Any = None, **bounds: Any) -> AsyncIterator[Running]:
    app = app or Application()

    async def drain() -> None: ...

    server = Server(configure(app, settings or Settings(), **bounds), drain)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    (listener,) = listen("127.0.0.1", 0)
    await server.startup([listener])
    running = Running(app, server, listener.getsockname()[1], [])
    try:
        yield running
    finally:
        for client in running.clients:
            client.writer.transport.abort()
        for task in server.server_state.tasks:
            task.cancel()
        for listening in server.servers:
            listening.close()
        for connection in tuple(server.server_state.connections):
            connection.transport.abort()
        await until(lambda: not server.server_state.connections)
        await server.lifespan.shutdown()
        listener.close()


def on_uvloop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test on the loop that serves in production: its flow control is what these tests are about."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(test(*args, **kwargs))

    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the connections more often, so that the bounds of the tests can be short."""
    monkeypatch.setattr(server_module, "LOOK_S", 0.05)
    monkeypatch.setattr(hardening, "LINGER_S", 0.5)


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: v\r\n" % n for n in range(10_000)), 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nh: " + b"v" * 300_000, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"h" * 70_000, 431, "headers_too_large"),
        (b"GET /" + b"a" * 9_000, 414, "uri_too_long"),
        (b"G" * 70_000, 400, "malformed_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: v\r\n" % n for n in range(101)) + b"\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"h: %b\r\n" % (b"v" * 800) * 90 + b"\r\n", 431, "headers_too_large"),
        (CHUNKED + b"1;" + b"e" * 600_000, 431, "headers_too_large"),
        (CHUNKED + b"0\r\nt: " + b"e" * 600_000, 431, "headers_too_large"),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400, "malformed_request"),
    ],
    ids=[
        "many",
        "endless value",
        "endless name",
        "target",
        "method",
        "TLS",
        "101",
        "long",
        "extension",
        "trailer",
        "smuggling",
    ],
)
@on_uvloop
async def test_a_hostile_head_is_refused_while_it_arrives(head: bytes, status: int, code: str) -> None:
    """Too much head, target, chunk extension or trailer is answered before its end comes, then the connection ends."""
    async with serving() as running:
        client = await running.connect()
        client.send(head)
        found, headers, body = await client.answer()
        assert (found, headers["connection"]) == (status, "close")
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["code"] == code
        assert await client.ended()
        client.writer.close()
        await until(lambda: not running.connections)


@on_uvloop
async def test_a_header_that_never_ends_does_not_fill_the_memory() -> None:
    """A client that goes on sending after its refusal is not listened to, and is cut off."""
    async with serving() as running:
        client = await running.connect()
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(8):
                client.send(b"GET / HTTP/1.1\r\nh: ")
                while True:
                    client.send(b"v" * 65_536)
                    await client.writer.drain()
        assert running.connections == []


@on_uvloop
async def test_what_is_allowed_passes() -> None:
    """100 header fields, 8 KiB of target, pipelined requests and chunked uploads are answered, in their order."""
    async with serving() as running:
        client = await running.connect()
        fields = b"".join(b"h%d: %b\r\n" % (n, b"v" * 500) for n in range(99))
        client.send(b"GET / HTTP/1.1\r\nhost: h\r\n" + fields + b"\r\n")
        assert (await client.answer())[0] == 200
        client.send(GET % (b"q" * 8_100))
        assert (await client.answer())[0] == 200
        running.app.delay_s = 0.02
        client.send(b"".join(GET % (b"%d" % n) for n in range(20)) + b"GET /?la")
        await asyncio.sleep(0.05)
        client.send(b"st HTTP/1.1\r\nhost: h\r\n\r\n")
        answers = [(await client.answer())[2]["query"] for _ in range(21)]
        assert answers == [*map(str, range(20)), "last"]
        client.send(CHUNKED)
        for _ in range(20):
            client.send(b"2710\r\n" + bytes(10_000) + b"\r\n")
        client.send(b"0\r\n\r\n")
        assert (await client.answer())[2]["size"] == 200_000


@on_uvloop
async def test_a_hostile_head_behind_a_request_does_not_cut_its_answer() -> None:
    """A refused request that was pipelined ends the connection after the answer under way."""
    async with serving() as running:
        running.app.delay_s = 0.1
        client = await running.connect()
        client.send(GET % b"first" + b"GET /" + b"a" * 9_000)
        assert (await client.answer())[2]["query"] == "first"
        assert await client.ended()
        client = await running.connect()
        client.send(GET % b"first" + b"GET / HTTP/1.1\r\n" + b"h: %b\r\n" % (b"v" * 800) * 90 + b"\r\n")
        assert (await client.answer())[2]["query"] == "first"
        assert await client.ended()
        client = await running.connect()
        client.send(GET % b"1" + GET % b"2" + CHUNKED + b"no chunk\r\n")
        assert [(await client.answer())[2]["query"] for _ in range(2)] == ["1", "2"]
        assert await client.ended()


@on_uvloop
async def test_requests_do_not_pile_up_behind_one_that_takes_long() -> None:
    """A packet is room for thousands of requests: the first hundred are answered, and then the connection ends."""
    async with serving() as running:
        running.app.delay_s = 0.01
        client = await running.connect()
        client.send(b"".join(GET % (b"%d" % n) for n in range(3_000)))
        assert [(await client.answer())[2]["query"] for _ in range(101)] == [*map(str, range(101))]
        assert await client.ended()


@on_uvloop
async def test_a_slow_head_or_body_is_answered_408() -> None:
    """A head that trickles is ended after its time, as is a body; the application hears of it."""
    settings = replace(Settings(), request_timeout_s=0.4)
    async with serving(settings, head_s=0.3) as running:
        head, body, late = await running.connect(), await running.connect(), await running.connect()
        body.send(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 100\r\n\r\n")
        late.send(b"POST /early HTTP/1.1\r\nhost: h\r\ncontent-length: 100\r\n\r\n")
        assert (await late.answer())[0] == 200
        for byte in b"GET / ":
            head.send(bytes([byte]))
            body.send(b"b")
            late.send(b"l")
            await asyncio.sleep(0.05)
        for client in (head, body, late):
            status, _, error = await client.answer()
            assert (status, error["error"]["code"]) == (408, "request_timeout")
            assert await client.ended()
            client.writer.close()
        assert running.app.disconnects == 1
        assert not [task for task in running.server.server_state.tasks if not task.done()]


@on_uvloop
async def test_blank_lines_do_not_keep_a_connection() -> None:
    """Line ends before a request are legal (RFC 9112, 2.2) and are no way to stay for ever."""
    async with serving(head_s=0.2, idle_s=60) as running:
        client = await running.connect()
        client.send(GET % b"q")
        await client.answer()
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(5):
                while True:
                    client.send(b"\r\n")
                    await client.writer.drain()
                    await asyncio.sleep(0.05)


@on_uvloop
async def test_who_says_nothing_is_closed() -> None:
    """A connection without a first request ends after the idle time, as one without a next request does."""
    async with serving(idle_s=1) as running:
        silent, served = await running.connect(), await running.connect()
        served.send(GET % b"q")
        await served.answer()
        assert all(await asyncio.gather(silent.ended(3), served.ended(3)))


@on_uvloop
async def test_a_body_that_comes_after_its_answer_keeps_no_connection() -> None:
    """Who sends the rest of a refused request and then nothing is closed after the idle time."""
    async with serving(idle_s=1) as running:
        client = await running.connect()
        client.send(b"POST /early HTTP/1.1\r\nhost: h\r\ncontent-length: 10\r\n\r\n")
        assert (await client.answer())[0] == 200
        client.send(b"0123456789")
        assert await client.ended(3)


@on_uvloop
async def test_an_answer_before_the_end_of_the_body_is_not_lost() -> None:
    """Who is told that the connection ends and is still sending can read why: it is not reset at once, but for those
    who go on and on; and what they send is no request.
    """
    async with serving() as running:
        client, endless = await running.connect(), await running.connect()
        for each in (client, endless):
            each.send(b"POST /early?close HTTP/1.1\r\nhost: h\r\ncontent-length: 2000000\r\n\r\n")
        await until(lambda: not running.server.server_state.tasks)
        for _ in range(20):
            client.send(bytes(100_000))
            await client.writer.drain()
        client.send(GET % b"q")
        assert (await client.answer())[2]["query"] == "close"
        assert await client.ended(3)
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(5):
                while True:
                    endless.send(bytes(10_000))
                    await endless.writer.drain()
                    await asyncio.sleep(0.01)
        await until(lambda: len(running.connections) <= 1)


@on_uvloop
async def test_a_long_answer_outlives_every_bound_of_arriving() -> None:
    """The times bound what clients send: an answer may take longer than any of them, also with a next head begun."""
    settings = replace(Settings(), request_timeout_s=0.2)
    async with serving(settings, head_s=0.1, idle_s=0.1) as running:
        running.app.delay_s = 0.6
        client = await running.connect()
        client.send(GET % b"long" + b"GET /")
        assert (await client.answer())[2]["query"] == "long"


@on_uvloop
async def test_too_many_connections_are_told_so() -> None:
    """Past the bound new connections get 503 and the old ones go on; far past it they are cut at once."""
    async with serving(connections=20) as running:
        first = [await running.connect() for _ in range(20)]
        await until(lambda: len(running.connections) == 20)
        status, headers, body = await (await running.connect()).answer()
        assert (status, headers["retry-after"]) == (503, "1")
        assert body["error"]["code"] == "too_many_connections"
        for _ in range(30):
            await running.connect()
        assert len(running.connections) <= 22
        first[0].send(GET % b"q")
        assert (await first[0].answer())[0] == 200


@on_uvloop
async def test_an_upgrade_is_answered_as_the_plain_request_it_is() -> None:
    """Who offers HTTP/2 with a request (RFC 7540, 3.2) keeps body and connection; in pieces it is a clear 400."""
    async with serving() as running:
        client = await running.connect()
        head = b"POST / HTTP/1.1\r\nhost: h\r\nconnection: Upgrade\r\nUpgrade: h2c\r\ncontent-length: 12\r\n\r\n"
        for _ in range(2):
            client.send(head + b"\r\nupgrade: x")
            status, headers, body = await client.answer()
            assert (status, body["size"], headers.get("connection")) == (200, 12, None)
        client.send(head[:50])
        await asyncio.sleep(0.02)
        client.send(head[50:])
        assert (await client.answer())[2]["error"]["code"] == "no_upgrade"


@on_uvloop
async def test_a_reader_that_stops_holds_little_and_nobody() -> None:
    """An unread stream stops at the transport's high water mark; others are answered; closed, it is cut off."""
    async with serving() as running:
        slow = await running.connect(limit=1024)
        slow.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.send(b"GET /stream HTTP/1.1\r\nhost: h\r\n\r\n")
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: running.app.written > 0)
        before = -1
        while before != running.app.written:
            before = running.app.written
            await asyncio.sleep(0.05)
        (connection,) = running.connections
        assert connection.transport.get_write_buffer_size() < 200_000
        assert before < 16 << 20  # what the kernel buffers of the two sides hold
        other = await running.connect()
        other.send(GET % b"q")
        assert (await other.answer())[0] == 200
        connection.transport.close()
        now = asyncio.get_running_loop().time()
        for later in (0, 5, 11):
            assert connection in running.connections
            connection.look(now + later)
            await asyncio.sleep(0.05)
        assert connection not in running.connections


@on_uvloop
async def test_2000_idle_connections_disturb_nobody() -> None:
    """With 2,000 connections that do nothing a request is answered as quickly as without."""
    async with serving() as running:
        for _ in range(2_000):
            await running.connect()
        await until(lambda: len(running.connections) == 2_000)
        client = await running.connect()
        loop = asyncio.get_running_loop()
        took = []
        for _ in range(50):
            began = loop.time()
            client.send(GET % b"q")
            assert (await client.answer())[0] == 200
            took.append(loop.time() - began)
            await asyncio.sleep(0.005)
        assert sorted(took)[45] < 0.05


@pytest.mark.parametrize(
    ("trusted", "client"), [(None, "127.0.0.1"), ("127.0.0.1", "10.1.2.3"), ("10.0.0.9", "127.0.0.1")]
)
@on_uvloop
async def test_only_a_trusted_proxy_names_the_client(trusted: str | None, client: str) -> None:
    """X-Forwarded-For counts when it comes from an address that the settings trust, and from nobody otherwise."""
    async with serving(replace(Settings(), trusted_proxies=trusted)) as running:
        connection = await running.connect()
        connection.send(b"GET / HTTP/1.1\r\nhost: h\r\nx-forwarded-for: 10.1.2.3\r\n\r\n")
        assert (await connection.answer())[2]["client"] == client


def test_one_address_is_shared_and_had_by_one_gateway() -> None:
    """Connections spread over the sockets of one gateway; a second gateway is refused, with the address."""
    sockets = listen("127.0.0.1", 0, 3)
    port = sockets[0].getsockname()[1]
    for sock in sockets[1:]:
        sock.listen(200)
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
    counts = []
    for sock in sockets:
        sock.setblocking(False)
        accepted = []
        while True:
            try:
                accepted.append(sock.accept()[0])
            except BlockingIOError:
                break
        assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in accepted)
        counts.append(len(accepted))
        for one in accepted:
            one.close()
    assert sum(counts) == 200 and min(counts) > 20
    for count in (1, 2):
        with pytest.raises(BindError, match=f"cannot listen on http://127.0.0.1:{port}: address already in use"):
            listen("127.0.0.1", port, count)
    for sock in [*clients, *sockets]:
        sock.close()


def test_a_reserved_address_is_the_workers_alone() -> None:
    """Who has reserved an address listens on it only with sockets that share it; a second gateway is refused always."""
    kept = reserve("127.0.0.1", free_ports(1)[0])
    address = kept.getsockname()
    taken = f"cannot listen on grpc://127.0.0.1:{address[1]}: address already in use"
    with pytest.raises(BindError, match=taken):  # before any worker listens
        reserve(*address)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    workers = [socket.socket() for _ in range(2)]
    for sock in workers:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # both, as gRPC does
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(200)
    clients = [socket.create_connection(address) for _ in range(100)]
    for sock in workers:
        sock.settimeout(5)
        sock.accept()[0].close()
    with pytest.raises(BindError, match=taken):
        reserve(*address)
    with pytest.raises(BindError):
        listen(*address)
    for sock in (*clients, *workers, kept):
        sock.close()
    reserve(*address).close()  # connections that linger do not keep it


def test_an_address_that_is_none_is_refused() -> None:
    """A host that this machine does not have, or that does not exist, is a sentence with the address."""
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(BindError, match=f"cannot listen on http://{host}:80: "):
            listen(host, 80)
        with pytest.raises(BindError, match=f"cannot listen on grpc://{host}:81: "):
            reserve(host, 81)
    assert url("::1", 80) == "http://[::1]:80"
