"""Starting what is measured and what it needs: each process pinned to its core, stopped while it is not its turn.

A system that waits for its turn is stopped (SIGSTOP), so that its timers take nothing from the one that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click
import redis

from benchmarks import gateway_mock
from benchmarks.gateway_load import Ask
from benchmarks.gateway_machine import cores, pin, tree
from orchestrator.local import tritonserver
from orchestrator.local.process import Child
from orchestrator.local.redisserver import EmbeddedRedis, binary
from orchestrator.ops.keyring import Keyring
from orchestrator.settings import Settings

START_S = 120.0
MISS, HIT = b"x-cache: miss", b"x-cache: hit"  # ours
MANY = "1000000000"  # a limit that is counted and never reached
# Production's profile, and every limit that there is.
POLICIES = {
    "ENVIRONMENT": "production",
    "TRUTHGPT_WORKERS": "1",
    "TRUTHGPT_LIMIT_PER_MINUTE": MANY,
    "TRUTHGPT_LIMIT_PER_HOUR": MANY,
    "TRUTHGPT_LIMIT_PER_DAY": MANY,
    "TRUTHGPT_LIMIT_TOKENS_PER_MINUTE": MANY,
    "TRUTHGPT_LIMIT_TOKENS_PER_DAY": MANY,
    "TRUTHGPT_CACHE": "true",
    "TRUTHGPT_AUDIT": "true",
    "TRUTHGPT_LOG_LEVEL": "info",
}


@dataclass
class Process:
    """A program that was started here; `stop` ends it and its children."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pids(self) -> list[int]:
        return tree(self.popen.pid)

    def pause(self) -> None:
        self._tell(signal.SIGSTOP)

    def resume(self) -> None:
        self._tell(signal.SIGCONT)

    def _tell(self, number: signal.Signals) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        self.resume()
        pids = self.pids
        self.popen.terminate()
        try:
            self.popen.wait(8)
        except subprocess.TimeoutExpired:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.popen.wait()

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def start(name: str, argv: list[str], environ: Mapping[str, str], log: Path, core: int, **options: Any) -> Process:
    """Start a program on one core; it ends with this one."""

    def before_exec() -> None:
        os.sched_setaffinity(0, {core})
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        given: dict[str, Any] = {"stdout": errors, "stderr": errors, "stdin": subprocess.DEVNULL, **options}
        popen = subprocess.Popen(argv, env=dict(environ), preexec_fn=before_exec, **given)
    return Process(name, popen, log)


@dataclass
class System:
    """Something that is measured. `port` speaks HTTP; `process` is None for what only stands behind others.

    `verify` asks once and says what is wrong, None when nothing is: it is asked until then after each pause.
    """

    name: str
    port: int
    process: Process | None
    verify: Callable[[], Awaitable[str | None]]
    key: str = ""
    model: str = gateway_mock.MODEL
    token: str = gateway_mock.TOKEN
    ask: Callable[..., Ask] | None = None  # makes its requests, where they are no plain chat completions
    miss: bytes = b""  # stand in the head of an answer that its cache did not have, and of one that it had
    hit: bytes = b""
    answered: int = 0  # requests so far
    extra: dict[str, Any] = field(default_factory=dict)

    async def turn(self) -> None:
        """Let it run, and wait until it answers well. Raises ClickException."""
        if self.process is not None:
            self.process.resume()
        deadline, fault = time.monotonic() + START_S, "nothing yet"
        while fault:
            try:
                fault = await self.verify() or ""
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
                fault = f"{type(error).__name__}: {error}"
            if fault:
                dead = self.process is not None and self.process.popen.poll() is not None
                if dead or time.monotonic() > deadline:
                    words = self.process.last_words() if self.process is not None else ""
                    raise click.ClickException(f"{self.name} does not answer as it should: {fault}\n{words}")
                await asyncio.sleep(0.1)

    def rest(self) -> None:
        if self.process is not None:
            self.process.pause()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def own_environ() -> dict[str, str]:
    """This process's environment without settings of ours."""
    return {k: v for k, v in os.environ.items() if not k.startswith("TRUTHGPT_") and k != "ENVIRONMENT"}


async def post(
    port: int, path: str, body: object, key: str = "", headers: Mapping[str, str] | None = None
) -> tuple[int, Any, Mapping[str, str]]:
    """One request beside the load: status, decoded body (text where it is no JSON), headers."""
    headers = headers or ({"authorization": f"Bearer {key}"} if key else {})
    timeout = aiohttp.ClientTimeout(total=10)
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers) as http,
        http.post(f"http://127.0.0.1:{port}{path}", json=body) as response,
    ):
        text = await response.text()
        return response.status, (json.loads(text) if text.startswith(("{", "[")) else text), response.headers


async def get(port: int, path: str) -> str:
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout) as http, http.get(f"http://127.0.0.1:{port}{path}") as response:
        if response.status != 200:
            raise ValueError(f"{path} answers {response.status}")
        return await response.text()


def chat_body(model: str, tokens: int = 1, stream: bool = False) -> dict[str, Any]:
    """A prompt that was not asked before."""
    words = [{"role": "user", "content": f"Verification {time.time_ns()}"}]
    return {"model": model, "messages": words, "max_tokens": tokens, "stream": stream}


async def answers_chat(port: int, model: str, key: str = "") -> str | None:
    """The plain check: a chat completion and a stream of two tokens are answered whole."""
    status, whole, _ = await post(port, "/v1/chat/completions", chat_body(model), key)
    if status != 200 or not whole["choices"][0]["message"]["content"]:
        return f"status {status}: {str(whole)[:300]}"
    status, text, _ = await post(port, "/v1/chat/completions", chat_body(model, 2, True), key)
    return None if status == 200 and "data: [DONE]" in str(text) else f"stream, status {status}: {str(text)[:300]}"


def mock(folder: Path) -> tuple[Process, System]:
    """The instant upstream, on the other core, and asking it directly."""
    argv = [sys.executable, "-m", "benchmarks.gateway_mock"]
    process = start("mock", argv, own_environ(), folder / "mock.log", cores()[1], stdout=subprocess.PIPE)
    assert process.popen.stdout is not None
    port = json.loads(process.popen.stdout.readline())["port"]
    return process, System("direct", port, None, lambda: answers_chat(port, gateway_mock.MODEL))


async def embedded_redis(folder: Path) -> tuple[Child, str]:
    """Redis as `truthgpt up` starts it, on the other core, and its URL."""
    server = EmbeddedRedis(folder / "redis-home", max_bytes=Settings().redis_max_bytes)
    child = await server.start(folder / "redis.log")
    pin(child.pid, cores()[1])
    return child, server.url


def tcp_redis(folder: Path) -> tuple[Process, int]:
    """A Redis that writes nothing to disk, on a port, on the other core, for peers."""
    (port,) = free_ports(1)
    argv = [str(binary()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    return start("redis", argv, own_environ(), folder / "peer-redis.log", cores()[1]), port


def make_key(url: str) -> str:
    """An API key in this Redis, without limits of its own: those of the settings hold for it."""
    with redis.Redis.from_url(url) as client:
        return Keyring(client).create("bench", note="benchmark")[1]


def ours(
    folder: Path, name: str, redis_url: str, key: str, triton: Mapping[str, int], model: str, token: str
) -> System:
    """The gateway as users run it, every policy on. `triton`: the ports (http, grpc, metrics) of what is behind it."""
    http, grpc, ops = free_ports(3)
    home = folder / name
    home.mkdir()
    environ = {
        **own_environ(), **POLICIES, "TRUTHGPT_HOME": str(home), "TRUTHGPT_REDIS_URL": redis_url,
        "TRUTHGPT_MODEL": model, "TRUTHGPT_HTTP_PORT": str(http), "TRUTHGPT_GRPC_PORT": str(grpc),
        "TRUTHGPT_OPS_PORT": str(ops), "TRUTHGPT_TRITON_HTTP_PORT": str(triton["http"]),
        "TRUTHGPT_TRITON_GRPC_PORT": str(triton["grpc"]), "TRUTHGPT_TRITON_METRICS_PORT": str(triton["metrics"]),
    }  # fmt: skip
    process = start(name, [sys.executable, "-m", "orchestrator.app"], environ, home / "gateway.log", cores()[0])

    async def verify() -> str | None:
        health = json.loads(await get(http, "/health"))
        await get(http, "/health/ready")
        if health["limits"]["degraded"]:
            return "limits are counted without Redis"
        status, body, headers = await post(http, "/v1/chat/completions", chat_body(model), key)
        if status != 200 or headers.get("x-cache") != "miss" or "ratelimit-policy" not in headers:
            return f"status {status}, headers {dict(headers)}: {str(body)[:300]}"
        return await answers_chat(http, model, key)

    extra = {"grpc": grpc, "ops": ops, "home": home}
    return System(name, http, process, verify, key, model, token, miss=MISS, hit=HIT, extra=extra)


async def triton(folder: Path, repository: Path, models: list[str], backend: Path) -> tuple[Child, dict[str, int]]:
    """A real tritonserver with these models, on the other core, and its ports. `backend` takes our backend's place."""
    http, grpc, metrics = free_ports(3)
    home = folder / "triton-home"
    home.mkdir()
    settings = Settings.load(
        {
            "home": home, "model_repository": repository, "triton_http_port": http, "triton_grpc_port": grpc,
            "triton_metrics_port": metrics,
        },
        own_environ(),
    )  # fmt: skip
    installation = tritonserver.find()
    argv = ["taskset", "--cpu-list", str(cores()[1]), *tritonserver.command(installation, settings, models)]
    shutil.copy2(backend, home / "triton" / "backends" / "inflight" / "model.py")
    child = await Child.start("triton", argv, tritonserver.environment(installation), home / "triton.log")
    deadline = time.monotonic() + START_S
    for model in models:
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
                await get(http, f"/v2/models/{model}/ready")
                break
            if time.monotonic() > deadline or child.returncode is not None:
                await child.kill()
                raise click.ClickException(f"Triton did not load {model}: {child.last_lines()}")
            await asyncio.sleep(0.1)
    return child, {"http": http, "grpc": grpc, "metrics": metrics}


async def stop_triton(child: Child, folder: Path) -> None:
    await child.stop(5)
    tritonserver.sweep(tritonserver.shm_prefix(folder / "triton-home"), kill=True)
