"""HTTP/1.1 from strangers: what arrives is bounded while it arrives, and nobody keeps a connection by doing nothing.

uvicorn's parser has no limits of its own: without these a header that never ends fills the memory.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from orchestrator.corked import Corked
from orchestrator.errors import Text

LINGER_S = 2.0  # for a refused client to read why, before the connection is reset under it
FIRST_S = 0.25  # for a request to come in on a connection accepted just before the server ends
STUCK_S = 10.0  # a closed connection whose client reads nothing of the rest for this long is reset
_UPGRADE = re.compile(rb"(?i)\r\nupgrade:")


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


@dataclass(frozen=True)
class Refusal:
    """An answer to what is not, or not yet, a request: nothing is known of its edge, key or language."""

    status: int
    kind: str
    code: str
    text: Text

    def encode(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        error = {"message": f"{self.text.en} {self.text.es}", "type": self.kind, "param": None, "code": self.code}
        body = json.dumps({"error": error}, ensure_ascii=False).encode()
        fixed = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        if self.status == 503:
            fixed.append((b"retry-after", b"1"))
        lines = [b"%b: %b\r\n" % header for header in (*headers, *fixed)]
        return b"".join([STATUS_LINE[self.status], *lines, b"\r\n", body])


def _invalid(status: int, code: str, en: str, es: str) -> Refusal:
    return Refusal(status, "invalid_request_error", code, Text(en, es))


MALFORMED = _invalid(400, "malformed_request", "This is not HTTP/1.1.", "Esto no es HTTP/1.1.")
TOO_SLOW = _invalid(
    408, "request_timeout", "The request took too long to arrive.", "La solicitud tardó demasiado en llegar."
)
NO_UPGRADE = _invalid(400, "no_upgrade", "Only HTTP/1.1 is spoken here.", "Aquí solo se habla HTTP/1.1.")
LONG_TARGET = _invalid(414, "uri_too_long", "The request's URL is too long.", "La URL de la solicitud es muy larga.")
LARGE_HEAD = _invalid(
    431,
    "headers_too_large",
    "The request's headers are too many or too long.",
    "Hay demasiadas cabeceras o muy largas.",
)
CROWDED = Refusal(
    503,
    "service_unavailable_error",
    "too_many_connections",
    Text("Too many connections.", "Hay demasiadas conexiones."),
)


def _without_upgrade(data: bytes) -> bytes:
    """A packet that begins with a head, with its Upgrade field renamed.

    A server may ignore that field (RFC 9110, 7.8), and Java's client offers HTTP/2 with it; but the parser takes what
    follows such a head for the other protocol, so that the body would be lost.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-ignored-upgrade:", head) + end + rest


class Config(uvicorn.Config):
    """uvicorn's configuration with the bounds of a connection."""

    def __init__(self, app: Any, bounds: Bounds, **options: Any) -> None:
        super().__init__(app, http=Hardened, ws="none", timeout_keep_alive=int(bounds.idle_s), **options)
        self.bounds = bounds


class Hardened(HttpToolsProtocol):
    """One connection. `look` is to be called about twice a second: it ends what has taken too long."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = config.bounds
        self._unparsed = 0  # bytes fed since the last whole head, piece of a body or end of a message
        self._fields = self._field_bytes = 0
        self._in_head = self._in_body = False
        self._refused: Refusal | None = None
        self._last = False  # the server ends: the next answer is this connection's last
        self._deadline = math.inf
        self._unread: tuple[int, float] | None = None  # of a closed connection: bytes to be read, and since when
        self._on_gone: Callable[[], None] | None = None  # of the request that is being answered
        # Weak: the request has them, the connection has the request, and they would wait for the garbage collector.
        when_gone = functools.partial(Hardened._when_gone, weakref.proxy(self))
        self._extensions: dict[str, dict[object, object]] = {"truthgpt.when_gone": {"call": when_gone}}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Corked(transport, self.loop))
        self._deadline = self.loop.time() + self._bounds.idle_s
        crowd = len(self.connections) - self._bounds.connections
        if crowd > self._bounds.connections // 10:  # so many that not even a refusal can be afforded
            self.transport.abort()
        elif crowd > 0:
            self._refuse(CROWDED)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._on_gone is not None:
            self._on_gone()

    def _when_gone(self, call: Callable[[], None] | None) -> None:
        """The extension by which an application hears of a hang-up without waiting for it."""
        self._on_gone = call
        if call is not None and self.transport.is_closing():
            self.loop.call_soon(call)

    def data_received(self, data: bytes) -> None:
        if self._refused is not None:
            return
        self._unset_keepalive_if_required()
        if b"pgrade:" in data and not self._in_head and not self._in_body:
            data = _without_upgrade(data)
        self._unparsed += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(self._refused or MALFORMED)
            return
        if self._unparsed > self._bounds.head_bytes:
            self._refuse(LARGE_HEAD)
        elif self._unparsed and not self._in_head and not self._in_body:
            self._in_head = True
            self._deadline = self.loop.time() + self._bounds.head_s

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
        self._fields = self._field_bytes = 0
        self._unparsed = max(self._unparsed, 1)  # when the one before ended in the same packet

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._bounds.target_bytes:
            self._stop_parsing(LONG_TARGET)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._fields += 1
        self._field_bytes += len(name) + len(value)
        if self._fields > self._bounds.fields or self._field_bytes > self._bounds.head_bytes:
            self._stop_parsing(LARGE_HEAD)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._stop_parsing(NO_UPGRADE)
        super().on_headers_complete()
        if self._last:
            self.cycle.keep_alive = False
        self._unparsed = 0
        self._in_head, self._in_body = False, True
        self._deadline = self.loop.time() + self._bounds.body_s

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._in_body = False
        self._deadline = math.inf  # the application and the keep-alive time-out see to the rest
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._refused is None:
            super().on_response_complete()
        else:  # what was refused came behind this request
            self._close_in_stages()

    def shutdown(self) -> None:
        """The server ends. Who has just connected, or is in the middle of a head, gets an answer first."""
        if self._answering or (self.cycle is not None and not self._in_head):
            super().shutdown()
        else:
            self._last = True
            self.loop.call_later(FIRST_S, self._close_unused)

    def _close_unused(self) -> None:
        if not self._answering:
            self.transport.close()

    def look(self, now: float) -> None:
        """End what has taken too long; `now` is the loop's time in seconds."""
        if self.transport.is_closing():
            unread = self.transport.get_write_buffer_size()
            if self._unread is None or unread < self._unread[0]:
                self._unread = (unread, now)
            elif now - self._unread[1] > STUCK_S:
                self.transport.abort()
        elif now < self._deadline:
            return
        elif self._refused is not None:
            self.transport.abort()
        elif self.pipeline or (self._in_head and self._answering):
            self._deadline = now + self._bounds.head_s  # its reading may be paused by ourselves
        elif self._in_head or self._in_body:
            self._refuse(TOO_SLOW)
        else:
            self.transport.close()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_parsing(self, refusal: Refusal) -> None:
        self._refused = refusal
        raise ValueError(refusal.code)  # the parser turns it into an HttpParserError

    def _refuse(self, refusal: Refusal) -> None:
        """Answer and close. A response under way is not cut into: the connection is closed behind it."""
        self._refused = refusal
        self._deadline = math.inf
        if self._answering:
            if self.pipeline or not self._in_body or self.cycle.response_started:
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(refusal.encode(self.server_state.default_headers))
        self._close_in_stages()

    def _close_in_stages(self) -> None:
        """RFC 9112, 9.6: a connection closed while its client still sends is reset, and the answer is lost on it."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self.transport.write_eof()
        self._deadline = self.loop.time() + LINGER_S
