"""The composition root: settings -> objects -> ASGI application -> server. `python -m orchestrator.app` serves.

Knows everyone, and nobody knows it. Starts and stays live while Triton is away; ready once its models answer.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from orchestrator import logs
from orchestrator.admission import Admission
from orchestrator.api.http import Receive, Scope, Send
from orchestrator.api.middleware import FrontDoor
from orchestrator.api.openai import OpenAI
from orchestrator.api.openai_request import Defaults
from orchestrator.api.probes import Probes
from orchestrator.gateway import Gateway
from orchestrator.health import Health
from orchestrator.settings import Settings, SettingsError
from orchestrator.store import Store
from orchestrator.triton import Deadlines, Triton

log = logging.getLogger(__name__)

IN_BAND_S = 1.0  # for the last error events to be written once the drain is over
IDLE_CONNECTION_S = 75


class Application:
    """The ASGI application: lifespan starts and stops the parts, everything else goes through the front door."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.gateway: Gateway | None = None
        self._door: FrontDoor | None = None
        self._triton: Triton | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http" and self._door is not None:
            await self._door(scope, receive, send)
        else:
            raise RuntimeError(f"no {scope['type']} is served here")

    async def start(self) -> None:
        """Assemble everything; needs a running loop."""
        settings = self.settings
        deadlines = Deadlines(
            stall_s=settings.stall_s,
            first_token_s=settings.first_token_s,
            request_s=settings.request_timeout_s,
            heartbeat_s=settings.heartbeat_timeout_s,
        )
        url = f"http://127.0.0.1:{settings.triton_http_port}"
        triton = self._triton = Triton(url, deadlines, default_max_tokens=settings.max_new_tokens)
        health = Health(triton, interval_s=settings.heartbeat_interval_s, engine_stall_s=settings.engine_stall_s)
        store = Store(settings.redis_url, settings.redis_timeout_s) if settings.redis_url else None
        gateway = self.gateway = Gateway(triton, health, Admission(settings.max_concurrency), [logs.log_request])
        # one request alone may not ask for more places than admission has
        at_once = min(settings.max_batch_size, settings.max_concurrency)
        openai = OpenAI(gateway, Defaults(temperature=settings.temperature), settings.request_timeout_s, at_once)
        probes = Probes(gateway, url, lambda: store.up if store else None)
        self._door = FrontDoor({**openai.routes, **probes.routes}, settings.body_limit_bytes)
        self._tasks = [asyncio.create_task(health.run(), name="health")]
        if store:
            self._tasks.append(asyncio.create_task(store.run(), name="store"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._triton is not None:
            await self._triton.close()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return


class Server(uvicorn.Server):
    """uvicorn, but a signal drains first: the port stays open and says 503 until the last running request has ended."""

    def __init__(self, application: Application, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._application = application
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            settings = self._application.settings
            log.info("listening on http://%s:%d", settings.host, settings.http_port)

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
        gateway = self._application.gateway
        try:
            if gateway is not None:
                await gateway.drain(self._application.settings.drain_s)
        finally:
            self.should_exit = True


def build(settings: Settings) -> Server:
    """The server of these settings, not yet running."""
    application = Application(settings)
    config = uvicorn.Config(
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
    return Server(application, config)


def main() -> int:
    """Serve until SIGTERM or SIGINT; 0 after a drain."""
    try:
        settings = Settings.load()
    except SettingsError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    logs.configure(settings.log_level, settings.debug)
    for warning in settings.warnings:
        log.warning("%s", warning)
    server = build(settings)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
