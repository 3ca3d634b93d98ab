"""The composition root: settings -> objects -> ASGI application. `python -m orchestrator.app` serves it.

Knows everyone, and nobody knows it. Starts and stays live while Triton is away; ready once its models answer.
"""

from __future__ import annotations

import asyncio
import sys

from orchestrator import logs
from orchestrator.admission import Admission
from orchestrator.api.fields import Defaults
from orchestrator.api.http import Receive, Scope, Send
from orchestrator.api.middleware import FrontDoor
from orchestrator.api.openai import OpenAI
from orchestrator.api.probes import Probes
from orchestrator.domain import Caller
from orchestrator.gateway import Gateway
from orchestrator.health import Health
from orchestrator.settings import Settings
from orchestrator.store import Store
from orchestrator.triton import Deadlines, Triton


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
        self._door = FrontDoor(
            {**openai.routes, **probes.routes},
            settings.body_limit_bytes,
            lambda headers, address: Caller(f"ip-{address}"),
        )
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


if __name__ == "__main__":
    from orchestrator.worker import main

    sys.exit(main())
