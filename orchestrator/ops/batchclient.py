"""Asking a gateway from a batch: tried again after what may pass, and slower after a 429."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from orchestrator.client import GatewayClient
from orchestrator.ops.batchfile import BatchError, Line, answered, failed

MAX_ANSWER_BYTES = 64 << 20
MAX_SLOTS = 64
OTHER_SLOTS = 4  # for a server that does not tell of its slots
CONNECT_S = 10.0
BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
_NO_KEY = "the gateway asks for an API key"
_AGAIN = (408, 409)  # and every 5xx, as OpenAI's own clients do

Row = dict[str, Any]


class Gate:
    """Bounds the requests in flight, and closes for all of them when one is told to come back later.

    Additive increase, multiplicative decrease (Chiu and Jain 1989): a 429 halves the bound, answers raise it again by
    one for each round of them, so that a limit is met by few requests that are refused.
    """

    def __init__(self, most: int) -> None:
        self._most, self._allowed, self._inside = most, float(most), 0
        self._opens_at = 0.0  # the loop's time
        self._left = asyncio.Event()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        while (wait := self._opens_at - loop.time()) > 0 or self._inside >= int(self._allowed):
            if wait > 0:
                await asyncio.sleep(wait)
            else:
                self._left.clear()
                await self._left.wait()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._left.set()

    def answered(self) -> None:
        self._allowed = min(self._most, self._allowed + 1 / self._allowed)

    def refused(self, wait_s: float) -> None:
        self._allowed = max(1.0, self._allowed / 2)
        self._opens_at = max(self._opens_at, asyncio.get_running_loop().time() + wait_s)


@dataclass(frozen=True)
class _Reply:
    """The row that this attempt makes if it is the last one, and whether another may do better."""

    row: Row
    status: int | None
    again: bool
    retry_after_s: float | None = None


@dataclass
class Asker:
    """A gateway asked over HTTP by at most `concurrency` requests at once; an asynchronous context.

    `retries` bounds the further attempts of a line after failures. What the caller's own rate limit refuses is asked
    again as long as `timeout_s` lasts: all attempts and waits of a line since its first one.
    """

    url: str
    api_key: str | None = field(repr=False)
    concurrency: int
    retries: int
    timeout_s: float
    backoff_s: float = BACKOFF_S
    rng: random.Random = field(default_factory=random.SystemRandom, repr=False)

    async def __aenter__(self) -> Self:
        self._base, self._gate = base_of(self.url), Gate(self.concurrency)
        self._http = session(self.api_key, self.concurrency)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def ask(self, line: Line, id: str) -> Row:
        """The output line with this id.

        Raises BatchError for a 401, and when the rate limit ends later than `timeout_s` from now.
        """
        loop, failures, reply = asyncio.get_running_loop(), 0, None
        while True:
            async with self._gate.passing():
                if reply is None:
                    deadline = loop.time() + self.timeout_s
                elif loop.time() >= deadline:
                    return reply.row
                reply = await self._attempt(line, id, deadline - loop.time())
                self._tell_gate(reply)
            if reply.status == 401:  # it is the same for every line: none is spent on it
                hint = "set TRUTHGPT_API_KEY to a key made by `truthgpt keys create`, and run the same command again"
                raise BatchError(f"{self._base} does not take the API key" if self.api_key else _NO_KEY, hint)
            if reply.status == 429:
                continue
            failures += 1
            wait = max(self._backoff(failures), reply.retry_after_s or 0.0)
            if not reply.again or failures > self.retries or loop.time() + wait >= deadline:
                return reply.row
            await asyncio.sleep(wait)

    def _tell_gate(self, reply: _Reply) -> None:
        if reply.status == 429:
            wait_s = reply.retry_after_s or self._backoff(1)
            if wait_s > self.timeout_s:
                hint = "run the same command again then; what is done is kept"
                raise BatchError(f"the rate limit is used up for {wait_s:.0f} s", hint)
            self._gate.refused(wait_s)
        elif reply.status is not None and reply.status < 500:
            self._gate.answered()

    def _backoff(self, failures: int) -> float:
        """Seconds: doubled with every failure, and drawn from the upper half so that no two come back together."""
        return min(MAX_BACKOFF_S, self.backoff_s * 2.0 ** (failures - 1)) * self.rng.uniform(0.5, 1.0)

    async def _attempt(self, line: Line, id: str, left_s: float) -> _Reply:
        def error(code: str, message: str, again: bool) -> _Reply:
            return _Reply(failed(id, line.custom_id, code, message, line.number), None, again)

        timeout = aiohttp.ClientTimeout(total=max(left_s, 0.001), sock_connect=CONNECT_S)
        try:
            async with self._http.post(
                self._base + line.url, data=line.body, timeout=timeout, allow_redirects=False
            ) as response:
                data = await _read(response)
        except aiohttp.ServerTimeoutError:
            return error("connection_failed", f"{self._base} took no connection in time", True)
        except TimeoutError:
            return error("timeout", f"no answer within {self.timeout_s:g} s", False)
        except (aiohttp.ClientError, OSError) as fault:
            return error("connection_failed", str(fault) or type(fault).__name__, True)
        status = response.status
        if data is None:
            return error("invalid_answer", f"the answer is longer than {MAX_ANSWER_BYTES} bytes", False)
        body = _json(data)
        if not isinstance(body, dict):
            if 200 <= status < 300:
                return error("invalid_answer", "the answer is not a JSON object", False)
            body = data[:10_000].decode("utf-8", "replace")
        row = answered(id, line.custom_id, status, response.headers.get("x-request-id", ""), body)
        return _Reply(row, status, status in _AGAIN or status >= 500, _seconds(response.headers.get("retry-after")))


def base_of(url: str) -> str:
    """The URL before its paths. Raises GatewayError where it is none."""
    GatewayClient(url)
    return (url if "://" in url else f"http://{url}").rstrip("/")


def session(api_key: str | None, connections: int) -> aiohttp.ClientSession:
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=connections))


async def slots(url: str, api_key: str | None) -> int:
    """How many requests the gateway's models run at once, from 1 to 64. Raises BatchError when nothing answers."""
    base = base_of(url)
    try:
        async with session(api_key, 1) as http:
            timeout = aiohttp.ClientTimeout(total=CONNECT_S)
            async with http.get(f"{base}/health", timeout=timeout, allow_redirects=False) as response:
                health = _json(await _read(response) or b"")
    except (aiohttp.ClientError, OSError) as error:
        message = f"{base} does not answer: {error or type(error).__name__}"
        raise BatchError(message, "`truthgpt status` shows whether a stack runs") from error
    rows = health.get("models") if isinstance(health, dict) else None
    counts = [row.get("slots") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    known = sum(count for count in counts if isinstance(count, int))
    return min(MAX_SLOTS, known) if known > 0 else OTHER_SLOTS


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """The whole body, None when it is too long."""
    data = bytearray()
    async for part in response.content.iter_any():
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            response.close()
            return None
    return bytes(data)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None  # what is no JSON is said to be so by the callers


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds (RFC 9110, 10.2.3); as a date it is not understood and the own back-off is used."""
    return float(retry_after) if retry_after and retry_after.isdecimal() and len(retry_after) < 10 else None
