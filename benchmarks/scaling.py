"""How a step's time grows with slots, with context and with the queue. In this process, without Triton.

    python -m benchmarks.scaling [--rounds 5] [--precision int8]

- **slots**: a decode step of 1 to 64 sequences, 128 positions each.
- **context**: a decode step of 1 and of 16 sequences with 128 to 1024 positions each.
- **queue**: what a step costs beside the model, with 1 to 10,000 requests waiting: the whole engine with a model that
  takes no time, 16 sequences that run, and the moments between its decode steps.

The points of a figure take turns within a round; figures are medians over rounds. Writes
benchmarks/results/scaling.json, .md and .png; the last line printed is JSON.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from backends.inflight.errors import EngineError
from backends.inflight.opening import open_model
from backends.inflight.sequence import Delta
from benchmarks import checkpoint, contest, engine_report, inprocess
from benchmarks.contest import console

RESULTS = Path(__file__).parent / "results"
SLOTS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = (128, 256, 512, 1024)
QUEUE = (1, 10, 100, 1000, 10_000)
AT, ROWS = 128, (1, 16)
MAX_LEN, CHUNK, THREADS = 1024, 128, 2
VOCAB = 8
STEPS = 5  # of the model a sample, the fastest counts
ENGINE_STEPS = 300
PATIENCE_S = 120.0
FLAT = 1.25  # the queue's time a step may grow so much over its least

Point = tuple[str, int, int]  # figure, rows or running sequences, x


class Instant:
    """A model that takes no time, and notes when its steps began."""

    device, can_verify, can_save = "cpu", False, False

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._logits = np.zeros((max(SLOTS), VOCAB), np.float32)

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        self.moments.append(time.perf_counter())
        return self._logits[: len(tokens)]

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        return self._logits[:1]

    def prefill_fresh(self, first: int, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        return self._logits[: len(prompts)]

    def move(self, source: int, target: int, length: int) -> None:
        pass


class Nobody:
    """Whoever waits or runs, and is not listened to."""

    def admitted(self) -> None:
        pass

    def delta(self, delta: Delta) -> None:
        pass

    def error(self, error: EngineError) -> None:
        pass


def step_overhead_s(running: int, waiting: int) -> float:
    """Seconds of a step of an engine with so many sequences, none of it the model's: the median of ENGINE_STEPS.

    Raises RuntimeError when it does not get so far.
    """
    runner = Instant()
    engine = inprocess.engine(runner, running, waiting + running, CHUNK)
    for _ in range(running + waiting):
        engine.submit(inprocess.sequence([1, 2, 3], 1_000_000, lambda ids: "x" * len(ids), Nobody(), VOCAB))
    engine.start()
    until = time.monotonic() + PATIENCE_S
    while len(runner.moments) < ENGINE_STEPS + running:
        if time.monotonic() > until:
            raise RuntimeError(f"only {len(runner.moments)} steps in {PATIENCE_S:g} s with {waiting} waiting")
        time.sleep(0.01)
    engine.close(0.0)
    settled = runner.moments[running:][:ENGINE_STEPS]  # by then all have been admitted
    return statistics.median(b - a for a, b in zip(settled, settled[1:], strict=False))


def decode_s(runner: Any, rows: int, context: int) -> float:
    """Seconds of one decode step of so many rows at the end of a context."""
    tokens, positions = [*range(rows)], [context - 1] * rows
    took = []
    for _ in range(STEPS):
        began = time.perf_counter()
        runner.decode(tokens, positions)
        took.append(time.perf_counter() - began)
    return min(took)


def fill(runner: Any, slots: int, positions: int) -> None:
    """Prefill: memory that was never written is not read from where memory is."""
    for slot in range(slots):
        for start in range(0, positions, CHUNK):
            runner.prefill(slot, [*range(start, min(start + CHUNK, positions))], start)


def points() -> list[Point]:
    found: list[Point] = [("slots", slots, slots) for slots in SLOTS]
    found += [("context", rows, length) for rows in ROWS for length in CONTEXT]
    return found + [("queue", max(ROWS), waiting) for waiting in QUEUE]


def rows(samples: dict[Point, list[float]]) -> list[dict[str, Any]]:
    """A row a point, milliseconds a step; tokens/s where the model runs."""
    found = []
    for (figure, running, x), taken in samples.items():
        took = statistics.median(taken)
        row = {"figure": figure, "rows": running, "x": x, "ms_per_step": round(took * 1000, 4)}
        found.append(row if figure == "queue" else {**row, "tokens_per_s": round(running / took, 1)})
    return found


def growth(found: list[dict[str, Any]]) -> float:
    """The queue's time a step with the longest queue over that with the shortest."""
    taken = [row["ms_per_step"] for row in found if row["figure"] == "queue"]
    return round(taken[-1] / taken[0], 3) if taken and taken[0] else 0.0


def measure(runner: Any, rounds: int) -> dict[Point, list[float]]:
    samples: dict[Point, list[float]] = {}
    for round_number in range(rounds):
        for point in points():
            figure, running, x = point
            with console.status(f"round {round_number + 1}/{rounds}: {figure} {x:,}, {running} running"):
                measured: Callable[[], float] = (
                    (lambda n=running, x=x: step_overhead_s(n, x))
                    if figure == "queue"
                    else (lambda n=running, x=AT if figure == "slots" else x: decode_s(runner, n, x))
                )
                samples.setdefault(point, []).append(measured())
    return samples


def markdown(found: dict[str, Any]) -> str:
    here = found["machine"]
    parts = [
        "# How a step grows",
        f"{found['date']} · commit {found['commit']} · {found['precision']} · medians of {found['rounds']} rounds · "
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB · [how](../README.md#scaling)",
        f"With {QUEUE[-1]:,} requests waiting a step takes {found['queue_growth']:.2f} times what it takes with one: "
        f"{'flat' if found['queue_flat'] else 'NOT FLAT'} (at most {FLAT:g}).",
    ]
    for figure, name in (("slots", "sequences"), ("context", "positions"), ("queue", "waiting")):
        lines = [f"## {figure}", f"| {name} | running | ms a step | tokens/s |\n|---|---|---|---|"]
        lines[1] += "".join(
            f"\n| {row['x']:,} | {row['rows']} | {row['ms_per_step']:.3f} | {row.get('tokens_per_s', '')} |"
            for row in found["rows"] if row["figure"] == figure
        )  # fmt: skip
        parts += lines
    return "\n\n".join(parts) + "\n"


def plot(found: dict[str, Any], path: Path) -> bool:
    """A chart a figure, logarithmic; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (name, label) in zip(
        axes, (("slots", "sequences"), ("context", "positions"), ("queue", "waiting")), strict=True
    ):
        for running in dict.fromkeys(row["rows"] if name == "context" else 0 for row in found["rows"]):
            chosen = [r for r in found["rows"] if r["figure"] == name and (name != "context" or r["rows"] == running)]
            if chosen and (name == "context" or running == 0):
                label_of = f"{running} running" if name == "context" else None
                axis.plot([r["x"] for r in chosen], [r["ms_per_step"] for r in chosen], marker="o", label=label_of)
        axis.set(xscale="log", ylim=(0, None), xlabel=label, title=f"{name}: ms a step")
        axis.spines[["top", "right"]].set_visible(False)
        if name == "context":
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100))
@click.option("--precision", default="int8", show_default=True)
@click.option("--shape", default="12,768,12", show_default=True, help="Layers, width, heads.")
@click.option("--output", default=RESULTS / "scaling.json", type=click.Path(path_type=Path), show_default=False)
def main(rounds: int, precision: str, shape: str, output: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="truthgpt-scaling-") as name:
        folder = Path(name)
        with console.status("a random GPT-2, exported"):
            checkpoint.write(folder / "checkpoint", *(int(n) for n in shape.split(",")))
            checkpoint.export(folder / "checkpoint", folder / "models", "scaling", precision, max(SLOTS), MAX_LEN)
        runner = open_model(inprocess.read_entry(folder / "models" / "scaling", THREADS), 0).runner
        with console.status("prompts"):
            fill(runner, max(SLOTS), AT)
            fill(runner, max(ROWS), MAX_LEN)
        samples = measure(runner, rounds)
    found = rows(samples)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": engine_report.commit(), "rounds": rounds,
        "precision": precision, "machine": engine_report.machine([contest.read_bandwidth()]), "rows": found,
        "queue_growth": growth(found), "queue_flat": growth(found) <= FLAT,
    }  # fmt: skip
    table = Table(title=f"A step, {precision}")
    for column in ("figure", "running", "x", "ms a step", "tokens/s"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for row in found:
        took, tokens = f"{row['ms_per_step']:.3f}", f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""
        table.add_row(row["figure"], str(row["rows"]), f"{row['x']:,}", took, tokens)
    Console().print(table)
    engine_report.save(result, markdown(result), plot, output)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
