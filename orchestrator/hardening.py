"""HTTP/1.1 from strangers: what arrives is bounded while it arrives, and nobody keeps a connection by doing nothing.

uvicorn's parser has no limits of its own: without these a header that never ends fills the memory.
"""

from __future__ import annotations

import asyncio
import functools
import math
import re
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from orchestrator.httpcycle import Cycle, Turn
from orchestrator.refusals import CROWDED, LARGE_HEAD, LONG_TARGET, MALFORMED, NO_UPGRADE, TOO_SLOW, Refusal

LINGER_S = 2.0  # for a refused client to read why, before the connection is reset under it
FIRST_S = 0.25  # for a request to come in on a connection accepted just before the server ends
STUCK_S = 10.0  # a closed connection whose client reads nothing of the rest for this long is reset
_UPGRADE = re.compile(rb"(?i)\r\nupgrade:")
_ASGI = {"version": "3.0", "spec_version": "2.3"}


@dataclass(frozen=True)
class Bounds:
    """What one connection may send and how long it may take, and how many there may be in one process."""

    fields: int = 100
    head_bytes: int = 64 << 10  # of a head; also of a trailer or a chunk's extension
    target_bytes: int = 8 << 10
    head_s: float = 10.0  # from a head's first byte to its last
    body_s: float = 600.0
    idle_s: float = 75.0  # until a new connection's first byte, and between two requests
    connections: int = 10_000
    waiting: int = 100  # requests of a connection that came before the answer to the one before them


def _without_upgrade(data: bytes) -> bytes:
    """A packet that begins with a head, with its Upgrade field renamed.

    A server may ignore that field (RFC 9110, 7.8), and Java's client offers HTTP/2 with it; but the parser takes what
    follows such a head for the other protocol, so that the body would be lost.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-ignored-upgrade:", head) + end + rest


def _target(url: bytes) -> tuple[bytes, bytes]:
    """Path and query of a request's target. Raises HttpParserError for what is none."""
    if url[:1] == b"/" and b"#" not in url:
        path, _, query = url.partition(b"?")
        return path, query
    parsed = httptools.parse_url(url)
    return parsed.path, parsed.query or b""


class Config(uvicorn.Config):
    """uvicorn's configuration with the bounds of a connection, and what connections share."""

    def __init__(self, app: Any, bounds: Bounds, **options: Any) -> None:
        super().__init__(app, http=Hardened, ws="none", **options)
        self.bounds = bounds
        self.turn = Turn()


class Hardened(asyncio.Protocol):
    """One connection. `look` is to be called about twice a second: it ends what has taken too long."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:  # fmt: skip
        self.server_state, self.turn = server_state, config.turn
        self._connections: set[Any] = server_state.connections
        self._app, self._bounds = config.loaded_app, config.bounds
        self._loop = _loop or asyncio.get_running_loop()
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        # what comes after a request that says `connection: close` is ignored, and is no error
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._expects_continue = False
        self._packet = 0  # bytes fed last
        self._unparsed = 0  # bytes fed since the last whole head, piece of a body or end of a message
        self._in_head = self._in_body = False
        self._asked = False  # there was a request
        self._newest: Cycle | None = None  # until it is answered; it is this one's body that arrives
        self._running: Cycle | None = None
        self._waiting: deque[Cycle] = deque()  # requests that came before the answer to the one before them
        self._refused: Refusal | None = None
        self._closing = False  # what still comes is thrown away, for a while
        self._last = False  # the server ends: the next answer is this connection's last
        self._deadline = math.inf
        self._unread: tuple[int, float] | None = None  # of a closed connection: bytes to be read, and since when
        self._on_gone: Callable[[], None] | None = None  # of the request that is being answered
        self._gone_at = math.inf  # when it counts as gone though it is there
        # Weak: the request has them, the connection has the request, and they would wait for the garbage collector.
        when_gone = functools.partial(Hardened._when_gone, weakref.proxy(self))
        self._extensions: dict[str, dict[object, object]] = {"truthgpt.when_gone": {"call": when_gone}}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._connections.add(self)
        self.transport, self.flow = transport, FlowControl(transport)
        self._server, self._client = get_local_addr(transport), get_remote_addr(transport)
        self._deadline = self._loop.time() + self._bounds.idle_s
        crowd = len(self._connections) - self._bounds.connections
        if crowd > self._bounds.connections // 10:  # so many that not even a refusal can be afforded
            self.transport.abort()
        elif crowd > 0:
            self._refuse(CROWDED)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        for cycle in (self._running, self._newest):
            if cycle is not None:
                cycle.disconnect()
        self._waiting.clear()
        self.flow.resume_writing()
        self._parser = None
        self._tell_gone()

    def pause_writing(self) -> None:
        self.flow.pause_writing()

    def resume_writing(self) -> None:
        self.flow.resume_writing()

    def _when_gone(self, call: Callable[[], None], within_s: float | None) -> None:
        """The extension by which an application hears of a hang-up without waiting for it.

        A client that is still there after `within_s` counts as gone. None: the application is not interested any more,
        in that call; the request behind it may have begun and have its own.
        """
        if within_s is not None:
            self._on_gone, self._gone_at = call, self._loop.time() + within_s
            if self.transport.is_closing():
                self._loop.call_soon(self._tell_gone)
        elif self._on_gone == call:
            self._on_gone = None

    def _tell_gone(self) -> None:
        call, self._on_gone = self._on_gone, None
        if call is not None:
            call()

    def data_received(self, data: bytes) -> None:
        if self._refused is not None or self._closing or self._parser is None:
            return
        if b"pgrade:" in data and not self._in_head and not self._in_body:
            data = _without_upgrade(data)
        self._packet = len(data)
        self._unparsed += self._packet
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(self._refused or MALFORMED)
            return
        if self._unparsed > self._bounds.head_bytes:
            self._refuse(LARGE_HEAD)
        elif self._unparsed and not self._in_head and not self._in_body:
            self._in_head = True
            self._deadline = self._loop.time() + self._bounds.head_s

    def on_message_begin(self) -> None:
        self._url, self._headers, self._expects_continue = b"", [], False
        self._unparsed = max(self._unparsed, 1)  # when the one before ended in the same packet

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > self._bounds.target_bytes:
            self._stop_parsing(LONG_TARGET)

    def on_header(self, name: bytes, value: bytes) -> None:
        name, headers = name.lower(), self._headers
        headers.append((name, value))
        if len(headers) > self._bounds.fields:
            self._stop_parsing(LARGE_HEAD)
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects_continue = True

    def on_headers_complete(self) -> None:
        parser, limit = self._parser, self._bounds.head_bytes
        if parser is None:
            raise RuntimeError("a connection that is lost has no parser")
        # What has come altogether is seldom too much for a head: only then are its own bytes counted.
        if self._packet > limit or self._unparsed > limit:
            if sum(map(len, chain.from_iterable(self._headers))) > limit:
                self._stop_parsing(LARGE_HEAD)
        if parser.should_upgrade():
            self._stop_parsing(NO_UPGRADE)
        if len(self._waiting) >= self._bounds.waiting:  # one packet may have 14,000, of 1 KiB here each
            self._stop_parsing(MALFORMED)  # which is not said: the connection ends behind the answers to those before
        raw_path, query = _target(self._url)
        path, version = raw_path.decode("ascii"), parser.get_http_version()
        scope = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": self._headers,
            "server": self._server,
            "client": self._client,
            "extensions": self._extensions,
        }
        keep_alive = not self._last and version != "1.0" and parser.should_keep_alive()
        self._newest = cycle = Cycle(self, scope, keep_alive, self._expects_continue)
        if self._running is None:
            self._run(cycle)
        else:
            self.flow.pause_reading()
            self._waiting.append(cycle)
        self._asked = True
        self._headers = []  # a trailer's fields are bounded, too, but no part of the head
        self._unparsed = 0
        self._in_head, self._in_body = False, True
        self._deadline = self._loop.time() + self._bounds.body_s

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        if self._newest is not None:
            self._newest.feed(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._in_body = False
        self._deadline = math.inf  # an answer takes its time; afterwards the connection is idle
        if self._newest is not None:
            self._newest.feed_end()
        else:
            self._deadline = self._loop.time() + self._bounds.idle_s

    def _run(self, cycle: Cycle) -> None:
        self._running = cycle
        task = self._loop.create_task(cycle.run(self._app))
        self.server_state.tasks.add(task)
        task.add_done_callback(self.server_state.tasks.discard)

    def close(self, unread: bool) -> None:
        """Behind the whole answer, which may have come before the whole request: then that is `unread`."""
        if unread:
            self._close_in_stages()
        else:
            self.transport.close()

    def answered(self, cycle: Cycle) -> None:
        """The whole answer is written; what came behind this request is next."""
        self.server_state.total_requests += 1
        self.ended(cycle)
        if self._refused is not None and not self._waiting:  # what was refused came behind this request
            self._close_in_stages()
        elif not self._closing and not self.transport.is_closing():
            self.flow.resume_reading()
            if self._waiting:
                self._run(self._waiting.popleft())
            elif not self._in_head and not self._in_body:
                self._deadline = self._loop.time() + self._bounds.idle_s

    def ended(self, cycle: Cycle) -> None:
        """It is forgotten, or each would keep the other until a garbage collection."""
        if self._running is cycle:
            self._running = None
        if self._newest is cycle:
            self._newest = None

    def shutdown(self) -> None:
        """The server ends. Who has just connected, or is in the middle of a head, gets an answer first."""
        if self._newest is not None:
            self._newest.keep_alive = False
        elif self._asked and not self._in_head:
            self.transport.close()
        else:
            self._last = True
            self._loop.call_later(FIRST_S, self._close_unused)

    def _close_unused(self) -> None:
        if self._newest is None:
            self.transport.close()

    def look(self, now: float) -> None:
        """End what has taken too long; `now` is the loop's time in seconds."""
        if now >= self._gone_at:
            self._tell_gone()
        if self.transport.is_closing():
            unread = self.transport.get_write_buffer_size()
            if self._unread is None or unread < self._unread[0]:
                self._unread = (unread, now)
            elif now - self._unread[1] > STUCK_S:
                self.transport.abort()
        elif now < self._deadline:
            return
        elif self._closing:
            self.transport.abort()
        elif self._waiting or (self._in_head and self._newest is not None):
            self._deadline = now + self._bounds.head_s  # its reading may be paused by ourselves
        elif self._in_head or self._in_body:
            self._refuse(TOO_SLOW)
        else:
            self.transport.close()

    def _stop_parsing(self, refusal: Refusal) -> None:
        self._refused = refusal
        raise ValueError(refusal.code)  # the parser turns it into an HttpParserError

    def _refuse(self, refusal: Refusal) -> None:
        """Answer and close. A response under way is not cut into: the connection is closed behind it."""
        self._refused = refusal
        self._deadline = math.inf
        if self._waiting:
            if self._in_body:  # of the last one, which will not be whole
                self._waiting.pop()
                self._newest = self._waiting[-1] if self._waiting else self._running
            return
        if self._newest is not None:
            if not self._in_body or self._newest.started:
                return
            self._newest.disconnect()
        self.transport.write(refusal.encode(self.server_state.default_headers))
        self._close_in_stages()

    def _close_in_stages(self) -> None:
        """RFC 9112, 9.6: a connection closed while its client still sends is reset, and the answer is lost on it."""
        if self._closing or self.transport.is_closing():
            return
        self._closing = True
        self.flow.resume_reading()
        self.transport.write_eof()
        self._deadline = self._loop.time() + LINGER_S
