"""Whether `truthgpt bench` and NVIDIA's aiperf say the same of one endpoint, in one run.

    python -m benchmarks.aiperf_agreement --aiperf PATH [--concurrency 1,8] [--rounds 5] [--url URL --model NAME]

Both are run as anyone would run them, one after the other: streaming chat completions in a closed loop, prompts of as
many words (each of them sent once, and servers are asked not to answer from a cache), as many output tokens, as many
requests. They take turns within a round, and every second round the other one begins; figures are medians over rounds,
differences medians of those within a round. Without --url the endpoint is a stack of its own: gateway, Triton and a
model that counts, each of whose steps takes --step-ms. What the gateway itself knows of the time to the first token, in
its metrics and with the warm-up, is then shown as well. Writes benchmarks/results/aiperf.json. Exit code 1 if a
median, a mean or a rate differs by more than 5 %; percentiles above are shown and not judged, for they are a few
requests each.

aiperf needs an environment of its own: python -m venv aiperf-venv && aiperf-venv/bin/pip install aiperf
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, console, machine
from orchestrator.bench.prompts import Prompts

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "demo" / "model"  # aiperf loads one whether or not it counts with it
LIMIT = 0.05
RUN_S = 900.0  # the most that one run of either may take
MODEL = "counting"
INSTALL = "python -m venv aiperf-venv && aiperf-venv/bin/pip install aiperf, then --aiperf aiperf-venv/bin/aiperf"
# our figure -> aiperf's; times are seconds here and milliseconds there
TIMES = {
    "ttft_s": "time_to_first_token", "tpot_s": "inter_token_latency", "itl_s": "inter_chunk_latency",
    "latency_s": "request_latency",
}  # fmt: skip
RATES = {"output_tokens_per_s": "output_token_throughput", "requests_per_s": "request_throughput"}
STATISTICS = {"p50": "p50", "mean": "avg", "p90": "p90", "p99": "p99"}
JUDGED = ("p50", "mean")
GATEWAY = "ttft_s.mean, gateway"
_METRIC = re.compile(r"^truthgpt_time_to_first_token_seconds_(sum|count)\{.*\} (\S+)$", re.MULTILINE)

Figures = dict[str, float]
Counted = tuple[float, float]  # seconds to first tokens in all, and how many these were


@dataclass(frozen=True)
class Work:
    """What is asked of whom."""

    url: str
    model: str
    prompt_words: int
    output_tokens: int
    requests_a_client: int

    def requests(self, clients: int) -> int:
        """Whole turns of every client, and enough of them where there are few clients."""
        return clients * self.requests_a_client if clients > 1 else 2 * self.requests_a_client


def ours_command(work: Work, clients: int, prompts: str) -> list[str]:
    return [
        "bench", "--url", work.url, "--model", work.model, "--concurrency", str(clients), "--warmup", str(clients),
        "--requests", str(work.requests(clients)), "--output-tokens", str(work.output_tokens),
        "--prompt-file", prompts, "--json",
    ]  # fmt: skip


def aiperf_command(work: Work, clients: int, prompts: str, tokenizer: str, folder: str) -> list[str]:
    return [
        "profile", "--url", work.url, "--model", work.model, "--endpoint-type", "chat", "--streaming",
        "--concurrency", str(clients), "--request-count", str(work.requests(clients)),
        "--warmup-request-count", str(clients), "--input-file", prompts, "--custom-dataset-type", "single_turn",
        "--extra-inputs", "temperature:0", "--header", "Cache-Control:no-cache", "--use-server-token-count",
        "--tokenizer", tokenizer, "--no-server-metrics", "--no-gpu-telemetry", "--ui", "none",
        "--artifact-dir", folder,
    ]  # fmt: skip


def run_ours(work: Work, clients: int, folder: Path, seed: str) -> Figures:
    """One run of `truthgpt bench`."""
    prompts = Prompts(seed, work.prompt_words)
    texts = [prompts.take().text for _ in range(work.requests(clients) + clients)]
    path = folder / "ours.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    command = [sys.executable, "-m", "orchestrator.cli", *ours_command(work, clients, str(path))]
    answer, cpu_s = _run(command, folder)
    run = json.loads(answer)["runs"][0]
    found = {f"{name}.{part}": run[name][part] for name in TIMES for part in STATISTICS}
    found |= {name: run[name] for name in RATES}
    return found | {
        "cpu_s": cpu_s, "prompt_tokens": run["prompt_tokens_mean"], "output_tokens": run["output_tokens_mean"],
    }  # fmt: skip


def run_aiperf(aiperf: str, tokenizer: Path, work: Work, clients: int, folder: Path, seed: str) -> tuple[Figures, str]:
    """One run of aiperf, and its version."""
    prompts = Prompts(seed, work.prompt_words)
    texts = [prompts.take().text for _ in range(work.requests(clients) + clients)]
    path, results = folder / "aiperf.jsonl", folder / "aiperf"
    rows = ({"text": text, "output_length": work.output_tokens} for text in texts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(results, ignore_errors=True)
    _, cpu_s = _run([aiperf, *aiperf_command(work, clients, str(path), str(tokenizer), str(results))], folder)
    document = json.loads((results / "profile_export_aiperf.json").read_text())
    answered = document["request_count"]["avg"]
    if answered != work.requests(clients) or "error_request_count" in document:
        raise click.ClickException(f"aiperf: {answered:g} of {work.requests(clients)} requests were answered")
    found = {
        f"{name}.{part}": document[theirs][there] / 1000
        for name, theirs in TIMES.items() for part, there in STATISTICS.items()
    }  # fmt: skip
    found |= {name: document[theirs]["avg"] for name, theirs in RATES.items()}
    found |= {
        "cpu_s": cpu_s,
        "prompt_tokens": document["input_sequence_length"]["avg"],
        "output_tokens": document["output_sequence_length"]["avg"],
    }
    return found, document["aiperf_version"]


def _run(command: list[str], folder: Path) -> tuple[str, float]:
    """What a command printed, and the processor time of it and all its processes, in seconds."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=RUN_S)
    except subprocess.TimeoutExpired:
        raise click.ClickException(f"{command[0]} did not end within {RUN_S:g} s") from None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()[-2000:]
        raise click.ClickException(f"exit code {done.returncode}: {' '.join(command)}\n{said}")
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextlib.contextmanager
def stack(folder: Path, step_ms: int) -> Iterator[tuple[str, Callable[[], Counted]]]:
    """A gateway, Triton and the counting model: its URL, and what reads its own counts."""
    from tests.counting import write_entry
    from tests.e2e.stack import Stack

    write_entry(folder / "repository", MODEL, slots=16, step_delay_ms=step_ms, max_len=4096)
    started = Stack(folder / "home", folder / "repository", MODEL)
    with console.status("starting a stack"):
        started.start()

    def counted() -> Counted:
        _, _, page = started.request("GET", "/metrics", port="OPS")
        found = dict(_METRIC.findall(page.decode()))
        return float(found.get("sum", 0)), float(found.get("count", 0))

    try:
        yield f"http://127.0.0.1:{started.ports['HTTP']}", counted
    finally:
        started.stop()


def compared(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each figure's medians over the rounds, and the median of what they differ by within one: aiperf's is 1."""
    rows = []
    for clients in dict.fromkeys(one["concurrency"] for one in rounds):
        those = [one for one in rounds if one["concurrency"] == clients]
        times = [f"{time}.{part}" for time in TIMES for part in STATISTICS]
        for name in (*times, *([GATEWAY] if GATEWAY in those[0]["aiperf"] else []), *RATES):
            ours, theirs = ([one[tool][name] for one in those] for tool in ("truthgpt", "aiperf"))
            difference = statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) - 1
            judged = name in RATES or name.endswith(JUDGED)
            rows.append({
                "concurrency": clients, "figure": name, "truthgpt": statistics.median(ours),
                "aiperf": statistics.median(theirs), "difference": round(difference, 4), "judged": judged,
                "agrees": abs(difference) <= LIMIT,
            })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="medians over rounds; times in ms")
    for column in ("clients", "figure", "truthgpt bench", "aiperf", "difference", ""):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for row in rows:
        scale = 1 if row["figure"] in RATES else 1000
        values = (f"{scale * row[tool]:.2f}" for tool in ("truthgpt", "aiperf"))
        verdict = ("agrees" if row["agrees"] else "DIFFERS") if row["judged"] else ""
        table.add_row(str(row["concurrency"]), row["figure"], *values, f"{row['difference']:+.1%}", verdict)
    Console().print(table)


def bench(
    aiperf: str, tokenizer: Path, work: Work, clients: tuple[int, ...], rounds: int,
    counted: Callable[[], Counted] | None,
) -> dict[str, Any]:  # fmt: skip
    """Run both, round by round."""
    found, version, load = [], "", os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="truthgpt-aiperf-") as name:
        folder = Path(name)
        for number in range(rounds):
            for count in clients:
                row: dict[str, Any] = {"round": number + 1, "concurrency": count}
                for tool in ("truthgpt", "aiperf") if number % 2 == 0 else ("aiperf", "truthgpt"):
                    seed = f"{tool} {number} {count}"
                    before = counted() if counted else (0.0, 0.0)
                    with console.status(f"round {number + 1}/{rounds}, {count} clients: {tool}"):
                        if tool == "truthgpt":
                            row[tool] = run_ours(work, count, folder, seed)
                        else:
                            row[tool], version = run_aiperf(aiperf, tokenizer, work, count, folder, seed)
                    if counted:
                        after = counted()
                        row[tool][GATEWAY] = (after[0] - before[0]) / (after[1] - before[1])
                found.append(row)
    rows = compared(found)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        "versions": {"truthgpt": metadata.version("truthgpt"), "aiperf": version},
        "work": {**asdict(work), "url": "HOST"},
        "commands": {
            "truthgpt": ["truthgpt", *ours_command(work, 8, "PROMPTS")],
            "aiperf": ["aiperf", *aiperf_command(work, 8, "PROMPTS", "demo/model", "FOLDER")],
        },
        "limit": LIMIT,
        "agrees": all(row["agrees"] for row in rows if row["judged"]),
        "figures": rows,
        "rounds": found,
    }


@click.command(help=__doc__)
@click.option("--aiperf", default="aiperf", show_default=True, help="The executable.")
@click.option("--url", help="An OpenAI endpoint that runs already.  [default: a stack of its own]")
@click.option("--model", help="What it serves; with --url.")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), default=TOKENIZER,
              help="A folder with one, for aiperf.  [default: demo/model]")  # fmt: skip
@click.option("--concurrency", default="1,8", show_default=True, help="Clients, a list.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100))
@click.option("--prompt-words", default=128, show_default=True, type=click.IntRange(6, 100_000))
@click.option("--output-tokens", default=32, show_default=True, type=click.IntRange(2, 100_000))
@click.option("--requests", "requests_a_client", default=6, show_default=True, type=click.IntRange(1, 100_000),
              help="Of each client; twice as many of a single one.")  # fmt: skip
@click.option("--step-ms", default=50, show_default=True, type=click.IntRange(1, 10_000), help="Of the counting model.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS / "aiperf.json")
def main(
    aiperf: str, url: str | None, model: str | None, tokenizer: Path, concurrency: str, rounds: int, prompt_words: int,
    output_tokens: int, requests_a_client: int, step_ms: int, output: Path,
) -> None:  # fmt: skip
    executable = shutil.which(aiperf)
    if executable is None:
        raise click.ClickException(f"there is no {aiperf}: {INSTALL}")
    if (url is None) != (model is None):
        raise click.UsageError("--url and --model belong together")
    try:
        clients = tuple(int(part) for part in concurrency.split(","))
    except ValueError:
        raise click.BadParameter("give numbers with commas between them", param_hint="--concurrency") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a stack is not left behind
    with tempfile.TemporaryDirectory(prefix="truthgpt-bench-") as name, contextlib.ExitStack() as ends:
        at, counted = (url, None) if url else ends.enter_context(stack(Path(name), step_ms))
        work = Work(at, model or MODEL, prompt_words, output_tokens, requests_a_client)
        result = bench(str(Path(executable).absolute()), tokenizer.absolute(), work, clients, rounds, counted)
    result["step_ms"] = None if url else step_ms
    show(result["figures"])
    output.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {output}")
    sys.exit(0 if result["agrees"] else 1)


if __name__ == "__main__":
    main()
