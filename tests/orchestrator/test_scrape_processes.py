"""The gateway's processes for real: what is scraped while everything that can fail has failed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.clock import awake
from tests.redis import RealRedis

from .conftest import eventually
from .fake_triton import FakeTriton
from .test_parent import Gateway, running

Samples = dict[str, float]


class Page:
    """The series of a gateway as Prometheus would see them, each time within a second."""

    def __init__(self, http: aiohttp.ClientSession, gateway: Gateway) -> None:
        self._http, self._url = http, f"http://127.0.0.1:{gateway.ops}/metrics"
        self.answered = 0.0  # generations that were ok: may never go back

    async def read(self) -> Samples:
        """`name{label,values}` -> value."""
        began = awake()
        async with self._http.get(self._url) as response:
            text = await response.text()
        assert awake() - began < 1.0
        samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[f"{sample.name}{{{','.join(sample.labels.values())}}}"] = sample.value
        now = samples.get("truthgpt_generations_total{m,ok}", 0.0)
        assert now >= self.answered
        self.answered = now
        return samples

    async def shows(self, check: Callable[[Samples], bool], timeout_s: float = 10.0) -> None:
        async def look() -> bool:
            await asyncio.sleep(0.05)
            return check(await self.read())

        await eventually(look, timeout_s)


async def test_a_scrape_answers_whatever_is_down(tmp_path: Path, fake: FakeTriton) -> None:
    """A worker, Redis and Triton stalled, then all of them killed: each scrape takes less than a second, says which of
    them it is, and takes nothing back.
    """
    with RealRedis() as redis:
        with running(tmp_path, triton_http_port=fake.port, redis_url=redis.url, redis_timeout_s=0.2) as gateway:
            async with aiohttp.ClientSession() as http:
                page = Page(http, gateway)
                await page.shows(lambda now: now.get("truthgpt_workers_ready{}") == 2, 20)
                await ask(http, gateway, 12)
                await page.shows(lambda now: page.answered == 12)
                victim, other = gateway.workers.values()

                victim.suspend()
                redis.stop_answering()
                fake.stopped = True
                await page.shows(lambda now: now["truthgpt_workers{silent}"] == 1)
                await page.shows(lambda now: now["truthgpt_redis_up{}"] == 0 == now["truthgpt_model_ready{m}"])
                assert page.answered == 12

                redis.kill()
                await fake.stop()
                for worker in (victim, other):
                    os.kill(worker.pid, signal.SIGKILL)
                restarted = {"truthgpt_worker_restarts_total{}": 2, "truthgpt_workers{down}": 2}
                await page.shows(lambda now: restarted.items() <= now.items() and "truthgpt_in_flight{}" not in now)
                assert page.answered == 12
        await fake.start()


async def ask(http: aiohttp.ClientSession, gateway: Gateway, count: int) -> None:
    """Requests on a connection each, so that both workers get some."""
    for number in range(count):
        async with http.post(
            f"http://127.0.0.1:{gateway.port}/v1/completions",
            json={"model": "m", "prompt": f"Hola {number}"}, headers={"connection": "close"},
        ) as response:  # fmt: skip
            assert response.status == 200, await response.text()
