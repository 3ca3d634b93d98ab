"""Workload W as it is run on a GPU machine: the client of Triton, and engines that take turns."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from typing import Any

import aiohttp

from benchmarks.common import console

PROMPT_TOKENS = NEW_TOKENS = 64


class Ours:
    """C streaming clients of Triton's generate_stream."""

    def __init__(self, url: str, precision: str, session: aiohttp.ClientSession) -> None:
        self.name = f"truthgpt {precision}"
        self._url, self._session = f"{url}/v2/models/w-{precision}/generate_stream", session

    async def run(self, prompts: list[list[int]]) -> dict[str, float]:
        began = time.perf_counter()
        done = await asyncio.gather(*(self._client(prompt) for prompt in prompts))
        took = time.perf_counter() - began
        assert all(tokens == NEW_TOKENS for tokens, _ in done), done
        first = statistics.median(first - began for _, first in done)
        return {
            "tokens_per_s": len(prompts) * NEW_TOKENS / took,
            "ms_per_token": took / NEW_TOKENS * 1000,
            "ttft_s": first,
        }

    async def _client(self, prompt: list[int]) -> tuple[int, float]:
        sampling = {"prompt_token_ids": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        body = {
            "text_input": "",
            "stream": True,
            "sampling_parameters": json.dumps(sampling),
            "return_num_output_tokens": True,
        }
        tokens, first = 0, 0.0
        async with self._session.post(self._url, json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    tokens += event.get("num_output_tokens", 0)
                    first = first or (time.perf_counter() if tokens else 0.0)
        return tokens, first


async def measure(engines: list[Any], clients: list[int], rounds: int) -> list[dict[str, Any]]:
    """Every engine at every client count in each round, the engines taking turns; medians."""
    random_ids = random.Random(0)
    prompts = [[random_ids.randrange(1000, 50000) for _ in range(PROMPT_TOKENS)] for _ in range(max(clients))]
    for engine in engines:
        await engine.run(prompts[: max(clients)])  # warm-up: allocations, page faults, first-use code
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    for round_number in range(rounds):
        for count in clients:
            for engine in engines if round_number % 2 == 0 else reversed(engines):
                with console.status(f"round {round_number + 1}/{rounds}: {engine.name}, {count} clients"):
                    samples.setdefault((engine.name, count), []).append(await engine.run(prompts[:count]))
    rows = []
    for (name, count), runs in samples.items():
        label, precision = name.rsplit(" ", 1)
        row: dict[str, Any] = {"engine": label, "precision": precision, "clients": count}
        for key in runs[0]:
            row[key] = round(statistics.median(run[key] for run in runs), 4)
        row["tokens_per_s_all"] = [round(run["tokens_per_s"], 1) for run in runs]
        rows.append(row)
    return rows
