"""The HTTP server: uvicorn, with a drain."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn

from orchestrator.settings import Settings

log = logging.getLogger(__name__)

IN_BAND_S = 1.0  # for the last error events to be written once the drain is over
IDLE_CONNECTION_S = 75


class Server(uvicorn.Server):
    """uvicorn, but a signal drains first: the port stays open and says 503 until the last running request has ended."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain_requests = drain
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            log.info("listening on http://%s:%d", self.config.host, self.config.port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._draining is not None:  # not started yet, or told twice: stop now
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, reason: str) -> None:
        if self._draining is None:
            log.info("%s: draining", reason)
            self._draining = asyncio.create_task(self._drain(), name="drain")

    async def _drain(self) -> None:
        try:
            await self._drain_requests()
        finally:
            self.should_exit = True


def configure(application: Any, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves an ASGI application with these settings."""
    return uvicorn.Config(
        application,
        host=settings.host,
        port=settings.http_port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=int(IN_BAND_S) + 1,
        backlog=2048,
    )
