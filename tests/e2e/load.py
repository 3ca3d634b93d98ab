"""Clients that keep asking a gateway while something is done to what stands behind it."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.clock import awake
from tests.counting import WORDS

PAUSE_S = 0.02  # of a client after a refusal
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Sample:
    """One request: when it began (`awake`), seconds to its headers, and how it ended.

    `outcome` is ok, in-band (an error inside a stream), the code of a refusal, or what no client may ever see.
    """

    began: float
    headers_s: float
    status: int
    outcome: str


@dataclass
class Load:
    """An asynchronous context in which `clients` ask for two tokens each, one request after another, half of them as
    streams, every prompt a new one.
    """

    url: str
    model: str
    key: str
    clients: int = 4
    samples: list[Sample] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self.key}"}
        self._http = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))
        self._random = random.Random()
        self._going = True
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self.clients)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._going = False
        await asyncio.gather(*self._tasks)
        await self._http.close()

    async def during(self, seconds: float) -> list[Sample]:
        """Every request that begins within the next `seconds`."""
        return await self.since(awake(), seconds)

    async def since(self, began: float, seconds: float) -> list[Sample]:
        """Every request that began from a moment until `seconds` from now, once all of them have ended."""
        await asyncio.sleep(seconds)
        ended = awake()
        while any(start <= ended for start in self._asking.values()):  # noqa: ASYNC110  clients come and go
            await asyncio.sleep(0.01)
        return [sample for sample in self.samples if began <= sample.began <= ended]

    async def _client(self, number: int) -> None:
        while self._going:
            self._asking[number] = began = awake()
            sample = await self._ask(began, stream=number % 2 == 0)
            self.samples.append(sample)
            del self._asking[number]
            if sample.outcome != "ok":
                await asyncio.sleep(PAUSE_S)

    def __post_init__(self) -> None:
        self._asking: dict[int, float] = {}

    async def _ask(self, began: float, stream: bool) -> Sample:
        prompt = " ".join(self._random.choices(WORDS, k=12))
        body = {"model": self.model, "prompt": prompt, "max_tokens": 2, "stream": stream}
        status, at = 0, began
        try:
            async with self._http.post(f"{self.url}/v1/completions", json=body) as response:
                status, at = response.status, awake()
                outcome = outcome_of(status, await response.read(), stream)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            outcome = f"{type(error).__name__}: {error}"
            at = awake()
        return Sample(began, at - began, status, outcome)


def outcome_of(status: int, body: bytes, stream: bool) -> str:
    if status != 200:
        return str(json.loads(body)["error"]["code"])
    if not stream:
        reason = json.loads(body)["choices"][0]["finish_reason"]
        return "ok" if reason == "length" else f"ended with {reason}"
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
    if events and events[-1] == b"[DONE]":
        last = json.loads(events[-2])["choices"][0]["finish_reason"]
        return "ok" if last == "length" else f"a clean end after {last}"
    return "in-band" if events and "error" in json.loads(events[-1]) else "a stream without an end"


def outcomes(samples: list[Sample]) -> dict[str, int]:
    """How often each outcome came, for assertions and their messages."""
    return dict(Counter(sample.outcome for sample in samples))


def slowest_s(samples: list[Sample]) -> float:
    return max(sample.headers_s for sample in samples)


async def until(check: Any, timeout_s: float, what: str) -> None:
    """Wait, without holding up the loop, for a check that may block. Fails after the time-out."""
    began = awake()
    while not await asyncio.to_thread(check):
        assert awake() - began < timeout_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.02)
