"""The pipelined connection against a real redis-server: order, deadlines, bounds, and every way in."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from orchestrator import redis_connection
from orchestrator.redis_connection import Address, Connection, StoreAway, StoreError
from tests.clock import awake
from tests.redis import RealRedis

from .conftest import until

PATIENT_S = 5.0  # where the deadline is not what is tested
Run = Callable[[Coroutine[Any, Any, None]], None]


@asynccontextmanager
async def connected(server: RealRedis, timeout_s: float = PATIENT_S) -> AsyncIterator[Connection]:
    connection = await Connection.open(Address(path=str(server.path)), timeout_s)
    try:
        yield connection
    finally:
        connection.close()


async def test_every_caller_gets_its_own_reply(server: RealRedis) -> None:
    """Thousands of commands, errors and cancelled callers among them, never mix up replies."""
    async with connected(server) as connection:
        chance = random.Random(7)
        wrong: list[tuple[int, object]] = []
        ended = {"answered": 0, "refused": 0, "cancelled": 0}

        async def caller(number: int) -> None:
            for turn in range(20):
                text = f"{number}:{turn}"
                if chance.random() < 0.05:
                    connection.send_only("PUBLISH", "nobody", text)
                command = ("NO-SUCH-COMMAND", text) if chance.random() < 0.1 else ("ECHO", text)
                reply = connection.send(*command)
                if chance.random() < 0.5:
                    asyncio.get_running_loop().call_later(chance.random() * 0.002, reply.cancel)
                try:
                    answer = await reply
                    ended["answered"] += 1
                    if answer != text.encode() or command[0] != "ECHO":
                        wrong.append((number, answer))
                except StoreError as error:
                    ended["refused"] += 1
                    if text not in str(error):
                        wrong.append((number, error))
                except asyncio.CancelledError:
                    ended["cancelled"] += 1

        await asyncio.gather(*(caller(number) for number in range(200)))
        assert wrong == []
        assert sum(ended.values()) == 4000
        assert min(ended.values()) > 50, ended
        assert connection.idle
        assert not connection.lost.done()


async def test_commands_of_one_tick_leave_in_one_write() -> None:
    """A hundred callers in one tick of the loop cost one system call."""
    writes: list[bytes] = []

    class Recorder(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            writes.append(bytes(data))

        def abort(self) -> None:
            pass

    connection = Connection(PATIENT_S)
    connection.connection_made(Recorder())
    replies = [connection.send("ECHO", number) for number in range(100)]
    assert writes == []  # nothing leaves before the tick ends
    await asyncio.sleep(0)
    assert len(writes) == 1
    assert writes[0].startswith(b"*2\r\n$4\r\nECHO\r\n$1\r\n0\r\n")
    connection.data_received(b"".join(b":%d\r\n" % number for number in range(100)))
    assert await asyncio.gather(*replies) == list(range(100))
    connection.close()


async def test_replies_keep_their_types_and_sizes(server: RealRedis) -> None:
    """Bytes, integers, nil and lists come as they are; values of 1 MiB pass in both directions, many at once."""
    async with connected(server) as connection:
        big = bytes(range(256)) * 4096
        assert await connection.send("SET", "big", big) == b"OK"
        assert await asyncio.gather(*(connection.send("GET", "big") for _ in range(8))) == [big] * 8
        assert await connection.send("GET", "nothing") is None
        assert await connection.send("EVAL", "return {1, 'a', {false}}", 0) == [1, b"a", [None]]
        assert await connection.send("ECHO", 1.5) == b"1.5"


async def test_a_deadline_ends_the_connection_for_everyone(server: RealRedis) -> None:
    """Stalled Redis: all that is pending fails about when its deadline passes, what comes later fails at once."""
    lost: list[float] = []
    address = Address(path=str(server.path))
    connection = await Connection.open(address, 0.05, on_lost=lambda: lost.append(time.monotonic()))
    server.stop_answering()
    try:
        now, began = time.monotonic(), awake()
        pending = [connection.send("ECHO", number, timeout_s=PATIENT_S) for number in range(50)]
        await asyncio.sleep(0)
        pending.append(connection.send("ECHO", "in a hurry"))
        results = await asyncio.gather(*pending, return_exceptions=True)
        assert time.monotonic() - now > 0.045 and awake() - began < 0.5
        assert all(isinstance(result, StoreAway) for result in results)
        assert len(lost) == 1
        with pytest.raises(StoreAway, match="deadline"):
            connection.send("ECHO", "late")
    finally:
        server.go_on()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("blocked", ["before the write", "in its tick", "after the write", "before the reply is read"])
def test_a_late_loop_is_not_redis_fault(server: RealRedis, run: Run, blocked: str) -> None:
    """Whoever blocks the loop past the deadline delays the reply, and does not make Redis be away."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()

        def read_slowly() -> None:
            ours.recv(1)
            time.sleep(0.1)

        with ours, theirs:
            loop.add_reader(ours, read_slowly)
            async with connected(server, timeout_s=0.05) as connection:
                for number in range(3):
                    if blocked == "in its tick":
                        loop.call_soon(time.sleep, 0.1)
                    reply = connection.send("ECHO", number)
                    if blocked == "before the write":
                        time.sleep(0.1)  # noqa: ASYNC251  blocking the loop is the point
                    await asyncio.sleep(0)
                    if blocked == "after the write":
                        time.sleep(0.1)  # noqa: ASYNC251
                    if blocked == "before the reply is read":
                        theirs.send(b"x")
                    assert await reply == str(number).encode()
            loop.remove_reader(ours)

    run(scenario())


async def test_an_idle_connection_has_no_deadline(server: RealRedis) -> None:
    """A deadline belongs to a command: an answered one leaves nothing behind that could end the connection."""
    async with connected(server, timeout_s=0.1) as connection:
        assert await connection.send("ECHO", "a") == b"a"
        await asyncio.sleep(0.25)
        assert not connection.lost.done()
        assert await connection.send("ECHO", "b") == b"b"


async def test_pending_commands_are_bounded(server: RealRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that does not keep up costs bounded memory: one command too many is refused, the others are not."""
    monkeypatch.setattr(redis_connection, "MAX_PENDING", 100)
    async with connected(server) as connection:
        replies = [connection.send("ECHO", number) for number in range(100)]
        with pytest.raises(StoreAway, match="100 commands"):
            connection.send("ECHO", "too many")
        assert len(await asyncio.gather(*replies)) == 100
        assert await connection.send("ECHO", "again") == b"again"


async def test_a_killed_server_is_noticed_at_once(server: RealRedis) -> None:
    """A lost connection fails what is pending without waiting for its deadline."""
    async with connected(server) as connection:
        server.stop_answering()  # so that the command is certainly pending
        reply = connection.send("ECHO", "a")
        await asyncio.sleep(0.01)
        server.restart()
        with pytest.raises(StoreAway, match="lost"):
            await asyncio.wait_for(reply, 2.0)


async def test_messages_and_replies_share_a_subscribers_connection(server: RealRedis) -> None:
    """Published messages go to their handler, replies to their callers, in whatever order they come."""
    messages: list[tuple[bytes, bytes]] = []
    address = Address(path=str(server.path))
    listener = await Connection.open(address, PATIENT_S, on_message=lambda *message: messages.append(message))
    async with connected(server) as connection:
        assert await listener.send("SUBSCRIBE", "news") == [b"subscribe", b"news", 1]
        for number in range(100):
            connection.send_only("PUBLISH", "news", number)
            assert (await listener.send("PING"))[0] == b"pong"
        await until(lambda: len(messages) == 100)
    assert messages == [(b"news", str(number).encode()) for number in range(100)]
    listener.close()


async def test_what_is_not_redis_is_away() -> None:
    """A server that speaks another protocol, or answers what nobody asked, is refused and not listened to."""
    for words, complaint in ((b"HTTP/1.1 400 Bad Request\r\n\r\n", "protocol"), (b"+A\r\n+B\r\n", "answer to nothing")):

        def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, words: bytes = words) -> None:
            writer.write(words)
            writer.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as other:
            port = other.sockets[0].getsockname()[1]
            connection = await Connection.open(Address(host="127.0.0.1", port=port), PATIENT_S)
            assert complaint in await asyncio.wait_for(connection.lost, 2.0)


async def test_nobody_there_is_away(tmp_path: Path) -> None:
    """A path without a socket, a closed port and a name that does not resolve are all StoreAway."""
    for address in (
        Address(path=str(tmp_path / "none")),
        Address(host="127.0.0.1", port=1),
        Address(host="no-such-host.invalid"),
    ):
        with pytest.raises(StoreAway):
            await Connection.open(address, 0.1)


async def test_passwords_users_and_databases() -> None:
    """The right password enters, a wrong one is Redis's own error; a user's rights and the database hold."""
    with RealRedis("--requirepass", "p", "--user", *"ana on >a ~* +@all -flushall".split()) as server:

        def entering(password: str, username: str | None = None, db: int = 0) -> Coroutine[Any, Any, Connection]:
            return Connection.open(Address(str(server.path), username=username, password=password, db=db), PATIENT_S)

        somebody, ana = await entering("p", db=3), await entering("a", "ana")
        assert await somebody.send("SET", "here", 1) == b"OK"
        assert await ana.send("GET", "here") is None  # it is in database 3
        with pytest.raises(StoreError, match="NOPERM"):
            await ana.send("FLUSHALL")
        for password, username in (("q", None), ("a", "eva"), ("", "ana")):
            with pytest.raises(StoreError, match="WRONGPASS"):
                await entering(password, username)
        with pytest.raises(StoreError, match="out of range"):
            await entering("p", db=99)
        somebody.close()
        ana.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_tls(server: RealRedis, tmp_path: Path, run: Run) -> None:
    """Over TLS commands, deadlines and large values hold; a certificate that nobody vouches for is refused."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key),
         "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    offered = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offered.load_cert_chain(certificate, key)

    async def scenario() -> None:
        async with forwarding(server, offered) as port:
            trusting = ssl.create_default_context(cafile=str(certificate))
            connection = await Connection.open(Address(port=port, tls=trusting), PATIENT_S)
            big = b"x" * (1 << 20)
            assert await connection.send("SET", "big", big) == b"OK"
            assert await connection.send("GET", "big") == big
            server.stop_answering()
            with pytest.raises(StoreAway, match="deadline"):
                await connection.send("GET", "big", timeout_s=0.05)
            server.go_on()
            with pytest.raises(StoreAway, match="certificate"):
                await Connection.open(Address(port=port, tls=ssl.create_default_context()), PATIENT_S)

    run(scenario())


@asynccontextmanager
async def forwarding(server: RealRedis, tls: ssl.SSLContext) -> AsyncIterator[int]:
    """A TLS port in front of the server's Unix socket."""
    tasks: set[asyncio.Task[None]] = set()

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                target.write(data)
        except OSError:  # the client ended the connection at once, as it should
            return
        finally:
            target.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_unix_connection(str(server.path))
        tasks.update({asyncio.create_task(copy(reader, forth)), asyncio.create_task(copy(back, writer))})

    listening = await asyncio.start_server(handle, "localhost", 0, ssl=tls)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
