"""Fixtures: a fake Triton on a real socket, and the real gateway in front of it on another."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
import redis

from orchestrator.app import Application
from orchestrator.domain import Record
from orchestrator.gateway import Gateway
from orchestrator.server import Server
from orchestrator.settings import Settings
from orchestrator.worker import build
from tests.clock import awake
from tests.redis import RealRedis

from .fake_triton import FakeTriton


@dataclass
class Stack:
    """A gateway that serves; `records` is what its sinks were handed."""

    url: str
    fake: FakeTriton
    http: aiohttp.ClientSession
    gateway: Gateway
    server: Server
    sunk: list[Record]
    grpc: str = ""  # address of the gRPC edge, where it is switched on

    @property
    def records(self) -> list[Record]:
        """Of every request that has ended, also of those that would be recorded a moment later."""
        self.gateway.record()
        return self.sunk

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, decoded body and lower-case headers of one POST; bytes are sent as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=data, headers=headers) as response:
            lower = {name.lower(): value for name, value in response.headers.items()}
            return response.status, await response.json(content_type=None), lower

    async def get(self, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
        async with self.http.get(self.url + path, headers=headers) as response:
            lower = {name.lower(): value for name, value in response.headers.items()}
            return response.status, await response.json(content_type=None), lower

    async def events(self, path: str, body: object) -> list[str]:
        """The data of every event of a stream, read to its end."""
        async with self.http.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            assert response.headers["content-type"].startswith("text/event-stream")
            text = (await response.read()).decode()
        assert text.endswith("\n\n")
        return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> float:
    """Wait for a condition; the seconds it took. Fails after the time-out."""
    began = awake()
    while not condition():
        assert awake() - began < timeout_s, "the condition did not come true"
        await asyncio.sleep(0.005)
    return awake() - began


async def eventually(check: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Wait for an asynchronous condition. Fails after the time-out."""
    began = awake()
    while not await check():
        assert awake() - began < timeout_s, "the condition did not come true"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def serving(fake: FakeTriton, wait: bool = True, **changes: Any) -> AsyncIterator[Stack]:
    """The real application under uvicorn in front of this fake, with short intervals."""
    quick = {"heartbeat_interval_s": 0.03, "heartbeat_timeout_s": 2.0, "stall_s": 2.0, "drain_s": 2.0, "connect_s": 5.0}
    quick |= {"audit": False, "grpc": False, "grpc_port": 0}
    settings = replace(Settings(), triton_http_port=fake.port, **{**quick, **changes})
    # asyncio switches Nagle's algorithm off only where the protocol is named
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server = build(settings)
    # uvicorn's own loop ticks every 0.1 s, which a test would wait for at its end; test_app.py runs it whole
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup([listener])
    application = server.config.app
    assert isinstance(application, Application)
    gateway = application.gateway
    assert gateway is not None
    records: list[Record] = []
    gateway._sinks = (*gateway._sinks, records.append)
    async with aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            if wait:
                await until(lambda: gateway.ready)
            grpc = f"127.0.0.1:{application.grpc.port}" if application.grpc is not None else ""
            yield Stack(url, fake, http, gateway, server, records, grpc)
        finally:
            await http.close()
            for listening in server.servers:
                listening.close()
            await until(lambda: not server.server_state.tasks)
            for connection in tuple(server.server_state.connections):  # one that lingers, so that its answer is read
                connection.transport.abort()
            await until(lambda: not server.server_state.connections)
            await server.lifespan.shutdown()


@pytest.fixture
async def fake() -> AsyncIterator[FakeTriton]:
    async with FakeTriton() as triton:
        yield triton


@pytest.fixture
async def stack(fake: FakeTriton) -> AsyncIterator[Stack]:
    async with serving(fake) as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[RealRedis]:
    """A real Redis for the tests of one module."""
    with RealRedis() as running:
        yield running


@pytest.fixture
def client(server: RealRedis) -> Iterator[redis.Redis]:
    """A client of that Redis, which is empty."""
    with redis.Redis.from_url(server.url) as connected:
        connected.flushall()
        yield connected
