"""Workload W: output tokens/s of a random GPT-2-small through Triton, against transformers' `generate`, in one run.

    python -m benchmarks.engine [--clients 1,8,16] [--rounds 3] [--precisions fp32,int8]

W: GPT-2-small's shape (124M parameters, random weights, seed 0), prompts of 64 tokens, exactly 64 new tokens, greedy,
C requests at
once. transformers gets them as one batch; Triton gets C streaming HTTP clients. Engines take turns within a round, so
that a machine whose
speed drifts favours none; figures are medians over rounds. Writes benchmarks/results/engine.json; the last line
printed is JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import click
import psutil
from rich.console import Console
from rich.table import Table

from orchestrator.local import tritonserver
from orchestrator.local.process import Child
from orchestrator.settings import Settings

PROMPT_TOKENS = NEW_TOKENS = 64
RESULTS = Path(__file__).parent / "results"
console = Console(stderr=True)


def write_checkpoint(folder: Path, layers: int, width: int, heads: int) -> None:
    """A random GPT-2 with a tokenizer whose tokens are made up; it has no end-of-text token, so every answer has full
    length.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i for i, token in enumerate([*alphabet, *(f"Ġw{i}" for i in range(config.vocab_size - len(alphabet)))])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def export(checkpoint: Path, repository: Path, precision: str, slots: int) -> None:
    argv = [sys.executable, "-m", "export", str(checkpoint), "--name", f"w-{precision}", "--precision", precision]
    argv += ["--repository", str(repository), "--slots", str(slots), "--max-len", "256"]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


class Transformers:
    """The reference: one static batch of C prompts."""

    name = "transformers fp32"

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    async def run(self, prompts: list[list[int]]) -> dict[str, float]:
        ids = self._torch.tensor(prompts)
        began = time.perf_counter()
        with self._torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=self._torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0,
                max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            )  # fmt: skip
        took = time.perf_counter() - began
        assert out.shape == (len(prompts), PROMPT_TOKENS + NEW_TOKENS)
        return {"tokens_per_s": out[:, PROMPT_TOKENS:].numel() / took, "ms_per_token": took / NEW_TOKENS * 1000}


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


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """tokens/s of each of our rows over transformers' at the same client count."""
    base = {row["clients"]: row["tokens_per_s"] for row in rows if row["engine"] == "transformers"}
    ours = (row for row in rows if row["engine"] != "transformers")
    return {
        f"{r['engine']} {r['precision']} / transformers, C={r['clients']}": round(
            r["tokens_per_s"] / base[r["clients"]], 2
        )
        for r in ours
    }


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    memory = round(psutil.virtual_memory().total / 2**30)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


async def start_triton(repository: Path, home: Path, models: list[str]) -> tuple[Child, str]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    http, grpc, metrics = (listener.getsockname()[1] for listener in listeners)
    for listener in listeners:
        listener.close()
    settings = Settings.load(
        {
            "home": home,
            "model_repository": repository,
            "triton_http_port": http,
            "triton_grpc_port": grpc,
            "triton_metrics_port": metrics,
        }
    )
    installation = tritonserver.find()
    argv = tritonserver.command(installation, settings, models)
    child = await Child.start("triton", argv, tritonserver.environment(installation), home / "triton.log")
    url = f"http://127.0.0.1:{http}"
    deadline = time.monotonic() + 120
    async with aiohttp.ClientSession() as session:
        for model in models:
            while True:
                try:
                    async with session.get(f"{url}/v2/models/{model}/ready") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                if time.monotonic() > deadline or child.returncode is not None:
                    await child.kill()
                    raise click.ClickException(f"Triton did not load {model}: {child.last_lines()}")
                await asyncio.sleep(0.2)
    return child, url


async def bench(clients: list[int], rounds: int, precisions: list[str], shape: tuple[int, int, int]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="truthgpt-bench-") as name:
        folder = Path(name)
        checkpoint, repository = folder / "checkpoint", folder / "repository"
        repository.mkdir()
        step("a random GPT-2", lambda: write_checkpoint(checkpoint, *shape))
        for precision in precisions:
            step(f"export {precision}", lambda p=precision: export(checkpoint, repository, p, max(clients)))
        (folder / "home").mkdir()
        triton, url = await start_triton(repository, folder / "home", [f"w-{p}" for p in precisions])
        try:
            timeout = aiohttp.ClientTimeout(total=600)
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
                engines = [Transformers(checkpoint), *(Ours(url, p, session) for p in precisions)]
                rows = await measure(engines, clients, rounds)
        finally:
            await triton.stop(5)
            tritonserver.sweep(tritonserver.shm_prefix(folder / "home"), kill=True)
    return {
        "workload": "W",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": rounds,
        "machine": machine(),
        "rows": rows,
        "ratios": ratios(rows),
    }


def step(what: str, do: Callable[[], object]) -> None:
    began = time.monotonic()
    with console.status(what):
        do()
    console.print(f"{what}: {time.monotonic() - began:.1f} s")


def show(result: dict[str, Any]) -> None:
    table = Table(title="Workload W: output tokens/s (median)")
    for column in ("engine", "precision", "clients", "tokens/s", "ms/token", "first token s", "× transformers"):
        table.add_column(column, justify="right" if column not in ("engine", "precision") else "left")
    for row in sorted(result["rows"], key=lambda r: (r["clients"], r["engine"], r["precision"])):
        ratio = result["ratios"].get(f"{row['engine']} {row['precision']} / transformers, C={row['clients']}", 1.0)
        first = f"{row['ttft_s']:.3f}" if "ttft_s" in row else ""
        figures = (f"{row['tokens_per_s']:.0f}", f"{row['ms_per_token']:.1f}", first, f"{ratio:.2f}")
        table.add_row(row["engine"], row["precision"], str(row["clients"]), *figures)
    Console().print(table)


@click.command(help=__doc__)
@click.option("--clients", default="1,8,16", show_default=True, help="Requests at once, a list.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 100))
@click.option("--precisions", default="fp32,int8", show_default=True)
@click.option("--shape", default="12,768,12", show_default=True, help="Layers, width, heads.")
@click.option("--output", default=RESULTS / "engine.json", type=click.Path(path_type=Path), show_default=False)
def main(clients: str, rounds: int, precisions: str, shape: str, output: Path) -> None:
    layers, width, heads = (int(n) for n in shape.split(","))
    result = asyncio.run(
        bench([int(c) for c in clients.split(",")], rounds, precisions.split(","), (layers, width, heads))
    )
    show(result)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
