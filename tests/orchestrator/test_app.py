"""The real processes: they start without Triton, drain on SIGTERM, exit 0."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import psutil
import pytest

from orchestrator.settings import Settings
from tests.clock import awake
from tests.e2e.stack import free_ports

from .fake_triton import FakeTriton, event

PLAIN = {"model": "m", "prompt": "Hola"}


@asynccontextmanager
async def gateway(triton_port: int, **changes: object) -> AsyncIterator[tuple[Process, str, aiohttp.ClientSession]]:
    """`python -m orchestrator.app` with these settings, once it is live."""
    port, grpc, ops = free_ports(3)
    settings = replace(
        Settings(), http_port=port, grpc_port=grpc, ops_port=ops, triton_http_port=triton_port,
        heartbeat_interval_s=0.05, audit=False,
    )  # fmt: skip
    environ = {**os.environ, **settings.child_environ(**changes)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orchestrator.app", stderr=PIPE, env=environ, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as http:
            await answers(http, f"{url}/health/live", 200)
            yield process, url, http
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def answers(http: aiohttp.ClientSession, url: str, status: int) -> None:
    async with asyncio.timeout(15):
        while True:
            try:
                async with http.get(url) as response:
                    if response.status == status:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.02)


async def test_live_without_triton_and_ready_with_it() -> None:
    """The gateway starts before Triton, becomes ready when Triton comes, serves, and SIGTERM ends it with 0."""
    async with FakeTriton() as fake:
        port = fake.port
        await fake.stop()
        async with gateway(port) as (process, url, http):
            await answers(http, f"{url}/health/ready", 503)
            await fake.start(port)
            await answers(http, f"{url}/health/ready", 200)
            async with http.post(f"{url}/v1/completions", json=PLAIN) as response:
                assert (await response.json())["choices"][0]["text"] == "Hola, ¿qué tal?"
            process.terminate()
            _, logged = await asyncio.wait_for(process.communicate(), 5)
            assert process.returncode == 0
            lines = [json.loads(line) for line in logged.decode().splitlines()]
            assert {"request", "SIGTERM: draining"} <= {line["message"] for line in lines}


async def all_serve(process: Process, url: str, count: int) -> None:
    """Wait until each worker has taken a connection."""
    port = int(url.rpartition(":")[2])
    async with asyncio.timeout(15):
        serving: list[psutil.Process] = []
        while len(serving) < count:
            writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(8)]
            await asyncio.sleep(0.05)
            serving = [
                worker
                for worker in psutil.Process(process.pid).children()
                if any(held.raddr and held.laddr.port == port for held in worker.net_connections("tcp"))
            ]
            for writer in writers:
                writer.close()


@pytest.mark.parametrize(("workers", "tell"), [(1, os.kill), pytest.param(2, os.killpg, marks=pytest.mark.slow)])
async def test_a_signal_drains(fake: FakeTriton, workers: int, tell: Callable[[int, int], None]) -> None:
    """While draining: not ready and 503 at once, the short stream ends whole, the endless one with an error event.

    On every worker, also on the one that had nothing to drain, and whether the signal is sent to the first process
    (as an init system does) or to all of them (as a terminal does).
    """
    fake.scripts = [[event("a"), 0.6, event("b", "stop"), "end"], [event("a"), *[0.2, event()] * 100, math.inf]]
    async with gateway(fake.port, drain_s=1.2, workers=workers) as (process, url, http):
        await all_serve(process, url, workers)
        await answers(http, f"{url}/health/ready", 200)

        async def stream() -> str:
            async with http.post(f"{url}/v1/completions", json={**PLAIN, "stream": True}) as response:
                return (await response.read()).decode()

        short = asyncio.create_task(stream())
        await asyncio.sleep(0.2)
        endless = asyncio.create_task(stream())
        await asyncio.sleep(0.2)
        now, began = time.monotonic(), awake()
        tell(process.pid, signal.SIGTERM if tell is os.kill else signal.SIGINT)
        await answers(http, f"{url}/health/ready", 503)
        await asyncio.sleep(0.1)
        for _ in range(10):  # each on a new connection
            async with http.post(f"{url}/v1/completions", json=PLAIN, headers={"connection": "close"}) as response:
                assert response.status == 503
                assert response.headers["retry-after"] == "1"
                assert (await response.json())["error"]["code"] == "draining"
        assert awake() - began < 1.0
        assert (await short).endswith("data: [DONE]\n\n")
        text = await endless
        assert '"code":"draining"' in text
        assert "[DONE]" not in text
        assert await asyncio.wait_for(process.wait(), 5) == 0
        assert time.monotonic() - now > 1.0 and awake() - began < 3.5
        assert fake.running == 0


async def test_wrong_settings_stop_it_with_a_sentence() -> None:
    """A bad variable is one error line each and exit code 2; a misspelt one is a warning."""
    environ = {**os.environ, "TRUTHGPT_HTTP_PORT": "many", "ENVIRONMENT": "prod", "TRUTHGPT_CONFIG": ""}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "orchestrator.app", stderr=PIPE, env=environ)
    _, logged = await process.communicate()
    assert process.returncode == 2
    assert logged.decode().count("error: ") == 2
    assert "Traceback" not in logged.decode()


async def test_a_taken_port_fails_the_start() -> None:
    """A second gateway on one port exits with 1 and names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = replace(Settings(), http_port=port, audit=False)
        environ = {**os.environ, **settings.child_environ()}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orchestrator.app", stderr=PIPE, env=environ
        )
        _, logged = await asyncio.wait_for(process.communicate(), 15)
        assert process.returncode == 1
        assert logged.decode() == f"error: cannot listen on http://127.0.0.1:{port}: address already in use\n"
