"""The HTTP server: uvicorn with bounds on what clients may do, and with a drain. Its sockets."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn

from orchestrator.hardening import Bounds, Config, Hardened
from orchestrator.openfiles import connections
from orchestrator.settings import Settings

log = logging.getLogger(__name__)

IN_BAND_S = 2  # for the last error events to be written once the drain is over
LOOK_S = 0.5
BACKLOG = 2048


class BindError(Exception):
    """A port cannot be had; the message names the address and the reason."""


class Server(uvicorn.Server):
    """uvicorn, but a signal drains first: the port stays open and says 503 until the last running request has ended."""

    def __init__(self, config: Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain_requests = drain
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._look()

    async def serve_beside(self, sockets: list[socket.socket]) -> None:
        """Serve in a process whose signals somebody else handles; ends when `should_exit` is set."""
        await self._serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or not self.started:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain, signal.Signals(sig).name)

    def drain(self, reason: str) -> None:
        """Begin to end; told again, it changes nothing (a terminal or an init system tells every process)."""
        if self._draining is None:
            log.debug("%s: this worker drains", reason)
            self._draining = asyncio.create_task(self._drain(), name="drain")

    async def _drain(self) -> None:
        try:
            await self._drain_requests()
        finally:
            self.should_exit = True

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in tuple(self.server_state.connections):
            if isinstance(connection, Hardened):
                connection.look(now)
        if self.server_state.connections or any(server.is_serving() for server in self.servers):
            asyncio.get_running_loop().call_later(LOOK_S, self._look)


def configure(application: Any, settings: Settings, **bounds: Any) -> Config:
    """How uvicorn serves an ASGI application with these settings; `bounds` are fields of Bounds."""
    room = {"connections": connections(), "body_s": settings.request_timeout_s}
    return Config(
        application,
        Bounds(**{**room, **bounds}),
        loop="uvloop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # who is not trusted must not be able to choose the address that limits are counted by
        proxy_headers=settings.trusted_proxies is not None,
        forwarded_allow_ips=settings.trusted_proxies or "",
        timeout_graceful_shutdown=IN_BAND_S,
        backlog=BACKLOG,
    )


def raise_file_limit() -> None:
    """As many open files as the system lets this process have: each connection is one, each request another."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(host: str, port: int, count: int = 1) -> list[socket.socket]:
    """Sockets that share one address; the kernel spreads connections over those that listen (SO_REUSEPORT).

    Only the first one listens yet. It is had exclusively before it is shared: otherwise a second gateway would get half
    of this one's connections. Raises BindError.
    """
    sockets: list[socket.socket] = []
    try:
        family, address = _resolve(host, port)
        for number in range(count):
            # the protocol is named: asyncio switches Nagle's algorithm off only where it is
            sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if number == 0:
                sock.bind(address)
                sock.listen(BACKLOG)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if number > 0:
                sock.bind(sockets[0].getsockname())
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _bind_error(url(host, port), error) from error
    return sockets


def reserve(host: str, port: int) -> socket.socket:
    """A socket that keeps an address for this process and its children, whose own sockets listen there (SO_REUSEPORT).

    It does not listen itself, or it would get its part of the connections. Raises BindError.
    """
    sock = None
    try:
        family, address = _resolve(host, port)
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the gateway before may linger
        sock.bind(address)
        sock.listen(1)  # the kernel refuses this where anybody else listens
        sock.shutdown(socket.SHUT_RD)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # with it, a second one could listen here now
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise _bind_error(url(host, port, "grpc"), error) from error
    return sock


def _resolve(host: str, port: int) -> tuple[int, Any]:
    """The first address of a name, an IPv4 one if it has any."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address


def _bind_error(where: str, error: OSError) -> BindError:
    reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    return BindError(f"cannot listen on {where}: {(reason or str(error)).lower()}")


def url(host: str, port: int, scheme: str = "http") -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
