"""The measurement of benchmarks/gpu/run.sh, which prepares what it needs; benchmarks/GPU.md describes both.

    python -m benchmarks.gpu.measure --work DIR [--cpu] [--clients 1,16,64] [--rounds 5] [--seconds 1800]

Prints one JSON document on standard output and everything else on standard error. Exit code 1 with a line `error: …`
when something failed, when the model did not run on the GPU, or when its answers are not transformers'.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import click
import numpy as np

from benchmarks import checkpoint as weights
from benchmarks import common
from benchmarks.gpu import workload
from benchmarks.gpu.parity import Parity, first_difference
from benchmarks.gpu.workload import NEW_TOKENS, PROMPT_TOKENS, Ours
from orchestrator.local import tritonserver

GPT2_SMALL, TINY = (12, 768, 12), (2, 64, 4)
CLIENTS = "1,2,4,8,16,32,64"
PROVED = 8  # prompts whose answers and logits are compared
MAX_DRIFT, MAX_GAP = 0.02, 0.1
PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "nvidia-pytriton", "numpy")


class Unmeasured(click.ClickException):
    """There is no result, and why."""

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.format_message()}", err=True)


class Late(BaseException):
    """The time is up: nobody's to catch but the command's."""


class Generate:
    """transformers on the device: one static batch of C prompts, as fast as it can be told to be."""

    def __init__(self, checkpoint: Path, device: str, precision: str, static: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch, self._device = torch, device
        dtype = torch.float16 if precision == "fp16" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
        # A static cache on a GPU makes `generate` compile the decode step.
        self._options = {"cache_implementation": "static"} if static else {}
        self.name = f"transformers{'-static' if static else ''} {precision}"

    def answer(self, prompts: list[list[int]]) -> list[list[int]]:
        """The new tokens of each prompt, greedy."""
        ids = self._torch.tensor(prompts, device=self._device)
        with self._torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=self._torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0,
                max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **self._options,
            )  # fmt: skip
        return [row[len(prompt) :] for row, prompt in zip(out.tolist(), prompts, strict=True)]

    def logits(self, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 [positions, vocab] of one sequence."""
        with self._torch.inference_mode():
            out = self.model(self._torch.tensor([ids], device=self._device)).logits[0]
        return np.asarray(out.float().cpu().numpy(), np.float32)

    async def run(self, prompts: list[list[int]]) -> dict[str, float]:
        """As workload.Ours: figures of one run."""
        began = time.perf_counter()
        answers = self.answer(prompts)  # a list of numbers: the device has finished
        took = time.perf_counter() - began
        assert all(len(answer) == NEW_TOKENS for answer in answers)
        return {"tokens_per_s": len(prompts) * NEW_TOKENS / took, "ms_per_token": took / NEW_TOKENS * 1000}


def export(checkpoint: Path, repository: Path, precision: str, slots: int, device: str) -> Path:
    """The entry `w-PRECISION`, told to run on the device and nowhere else; its version folder."""
    weights.export(checkpoint, repository, f"w-{precision}", precision, slots, 256)
    config = repository / f"w-{precision}" / "config.pbtxt"
    rest = [line for line in config.read_text(encoding="utf-8").splitlines() if 'key: "device"' not in line]
    wanted = f'parameters {{ key: "device" value: {{ string_value: "{device}" }} }}'
    config.write_text("\n".join([*rest, wanted, ""]), encoding="utf-8")
    return config.parent / "1"


async def heartbeat(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """What the backend says of itself, its device among it."""
    async with session.post(url, json={"text_input": "", "parameters": {"heartbeat": True}}) as answer:
        document = await answer.json()
    return dict(json.loads(document["text_output"]))


async def texts(session: aiohttp.ClientSession, url: str, prompts: list[list[int]]) -> list[str]:
    """Our greedy answers, all at once."""

    async def one(prompt: list[int]) -> str:
        sampling = {"prompt_token_ids": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        async with session.post(url, json={"text_input": "", "sampling_parameters": json.dumps(sampling)}) as answer:
            document = await answer.json()
        if "error" in document:
            raise Unmeasured(f"the model answers with an error: {document['error']}")
        return str(document["text_output"])

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def prove(
    entry: Path, checkpoint: Path, device: str, precision: str, ours: list[str], prompts: list[list[int]]
) -> Parity:
    """Our answers and logits beside those of transformers in the same precision and, for the drift, in fp32."""
    from transformers import AutoTokenizer

    same, exact = Generate(checkpoint, device, precision), Generate(checkpoint, device, "fp32")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    names = {text: token for token, text in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))}
    parity = Parity()
    for prompt, text, answer in zip(prompts, ours, same.answer(prompts), strict=True):
        at = first_difference(text, answer, tokenizer.decode)
        parity.agreed += at
        parity.tokens += len(answer)
        logits = exact.logits([*prompt, *answer])
        piece = re.match(r" w\d+", text[len(tokenizer.decode(answer[:at])) :]) if at < len(answer) else None
        if piece is not None:
            row = logits[len(prompt) - 1 + at]
            chosen = names[piece.group().replace(" ", "Ġ")]
            parity.gap = max(parity.gap, float((row.max() - row[chosen]) / row.std()))
        for length in range(len(prompt), len(prompt) + len(answer), 16):
            ids = [*prompt, *answer][:length]
            parity.expected.append(logits[length - 1])
            parity.transformers.append(same.logits(ids)[-1])
            parity.ours.append(graph_logits(entry, device, ids))
    return parity


_sessions: dict[Path, Any] = {}


def graph_logits(entry: Path, device: str, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [vocab] of a sequence's last position by the exported graph alone, on the device."""
    import onnxruntime as ort

    if entry not in _sessions:
        if device == "cuda":
            ort.preload_dlls()
        providers = [*(["CUDAExecutionProvider"] if device == "cuda" else []), "CPUExecutionProvider"]
        _sessions[entry] = ort.InferenceSession(str(entry / "model.onnx"), providers=providers)
    session, count = _sessions[entry], len(ids)
    feeds: dict[str, Any] = {
        "input_ids": np.asarray([ids]),
        "position_ids": np.arange(count)[None],
        "seqlens_k": np.asarray([count - 1], np.int32),
        "total_sequence_length": np.asarray(count, np.int32),
        "last_index": np.asarray([[count - 1]]),
    }
    for given in session.get_inputs():
        if given.name.startswith("past_"):
            kind = np.float16 if "float16" in given.type else np.float32
            feeds[given.name] = np.zeros((1, *given.shape[1:]), kind)
    return np.asarray(session.run(["logits"], feeds)[0][0], np.float32)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy of 1 GiB on the device, the best of ten."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = max(best, 2 * source.numel() / (time.perf_counter() - began))
    return best


def bars(rows: list[dict[str, Any]], floor_ms: float) -> dict[str, Any]:
    """B6: against the better of transformers' ways at one and sixteen clients, and against the memory's floor."""
    found: dict[str, Any] = {}
    for count, least in ((1, 1.5), (16, 3.0)):
        here = [row for row in rows if row["clients"] == count]
        peers = [row["tokens_per_s"] for row in here if row["engine"].startswith("transformers")]
        ours = [row["tokens_per_s"] for row in here if row["engine"] == "truthgpt"]
        if peers and ours:
            ratio = ours[0] / max(peers)
            found[f"B6 C={count}"] = {"ratio": round(ratio, 2), "at_least": least, "met": ratio >= least}
            if count == 1:
                times = next(row["ms_per_token"] for row in here if row["engine"] == "truthgpt") / floor_ms
                found["B6 floor"] = {"times": round(times, 2), "at_most": 2.0, "met": times <= 2.0}
    return found


def smi() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    keys = ("gpu", "compute_capability", "driver", "memory")
    return dict(zip(keys, (part.strip() for part in done.stdout.splitlines()[0].split(",")), strict=True))


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


async def warm(engines: list[Any], prompts: list[list[int]], clients: list[int]) -> tuple[list[Any], dict[str, str]]:
    """Run each engine once at each width (compilation, allocation); those that fail are left out, with the reason."""
    fit, failed = [], {}
    for engine in engines:
        try:
            for count in clients:
                await engine.run(prompts[:count])
            fit.append(engine)
        except Exception as error:
            if isinstance(engine, Ours):
                raise
            failed[engine.name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return fit, failed


async def bench(work: Path, cpu: bool, clients: list[int], rounds: int) -> dict[str, Any]:
    device, precision, shape = ("cpu", "fp32", TINY) if cpu else ("cuda", "fp16", GPT2_SMALL)
    checkpoint, repository, home = work / "checkpoint", work / "repository", work / "home"
    repository.mkdir(exist_ok=True)
    home.mkdir(exist_ok=True)
    common.step("a random GPT-2", lambda: weights.write(checkpoint, *shape))
    common.step(f"export {precision}", lambda: export(checkpoint, repository, precision, max(clients), device))
    entry = repository / f"w-{precision}" / "1"
    manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
    ids = random.Random(1)
    prompts = [[ids.randrange(1000, 50000) for _ in range(PROMPT_TOKENS)] for _ in range(max(PROVED, *clients))]
    triton, url = await common.start_triton(repository, home, [f"w-{precision}"])
    try:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
        ) as session:
            generate = f"{url}/v2/models/w-{precision}/generate"
            state = await heartbeat(session, generate)
            if not cpu and (state.get("device") != "cuda" or state.get("fallback")):
                raise Unmeasured(f"the model does not run on the GPU: its heartbeat says {state}")
            ours = await texts(session, generate, prompts[:PROVED])
            parity = prove(entry, checkpoint, device, precision, ours, prompts[:PROVED])
            engines: list[Any] = [Generate(checkpoint, device, precision), Ours(url, precision, session)]
            if not cpu:
                engines.insert(1, Generate(checkpoint, device, precision, static=True))
            fit, failed = await warm(engines, prompts, clients)
            rows = await workload.measure(fit, clients, rounds)
            state = await heartbeat(session, generate)
    finally:
        await triton.stop(5)
        tritonserver.sweep(tritonserver.shm_prefix(home), kill=True)
    result: dict[str, Any] = {
        "workload": "W",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "precision": precision,
        "machine": {**common.machine(), **({} if cpu else smi())},
        "versions": versions(),
        "rounds": rounds,
        "export": {"parity": manifest["parity"]},
        "parity": parity.document(),
        "heartbeat": state,
        "left_out": failed,
        "rows": rows,
    }
    if not cpu:
        size = sum(parameter.numel() for parameter in engines[0].model.parameters()) * 2
        bandwidth = copy_bandwidth(device)
        floor = size / bandwidth * 1000
        result["floor"] = {"weights_bytes": size, "bytes_per_s": round(bandwidth), "ms_per_token": round(floor, 4)}
        result["bars"] = bars(rows, floor)
    return result


@click.command(help=__doc__)
@click.option("--work", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--cpu", is_flag=True, help="Try it out: fp32 and a tiny model on the processor.")
@click.option("--clients", help=f"Requests at once, a list.  [default: {CLIENTS}; with --cpu 1,4]")
@click.option("--rounds", type=click.IntRange(1, 100), help="[default: 5; with --cpu 1]")
@click.option("--seconds", type=click.IntRange(10), default=1800, show_default=True, help="Give up after this long.")
def main(work: Path, cpu: bool, clients: str | None, rounds: int | None, seconds: int) -> None:
    counts = [int(count) for count in (clients or ("1,4" if cpu else CLIENTS)).split(",")]
    work.mkdir(parents=True, exist_ok=True)

    def late(*_: object) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)  # an alarm, as most of the time is spent where asyncio cannot interrupt
    signal.alarm(seconds)
    try:
        result = asyncio.run(bench(work, cpu, counts, rounds or (1 if cpu else 5)))
    except Late as error:
        raise Unmeasured(f"not finished after {seconds} s") from error
    except click.ClickException:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise Unmeasured(f"{type(error).__name__}: {lines[0] if lines else ''}") from error
    proven = result["parity"]
    result["ok"] = proven["drift"] <= MAX_DRIFT and proven["gap"] <= MAX_GAP
    print(json.dumps(result))
    if not result["ok"]:
        raise Unmeasured(
            f"the answers are not transformers': drift {proven['drift']:.1%} (at most {MAX_DRIFT:.0%}), a token chosen "
            f"{proven['gap']:.2f} standard deviations below the best (at most {MAX_GAP})"
        )


if __name__ == "__main__":
    main()
