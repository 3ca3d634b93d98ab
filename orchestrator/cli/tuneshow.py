"""What `truthgpt tune` shows: each measurement while it goes on, the frontier, and what is known from before."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import mean
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import table

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from orchestrator.ops.tune.figures import Figures
    from orchestrator.ops.tune.history import Row, Subject
    from orchestrator.ops.tune.tuning import Result, Trial

BATCH = ("slots", "max_tokens_per_batch", "max_batch_size")  # the first of these that is tuned is the size of a batch


class Display:
    """A line on standard error for each measurement, and on a terminal a bar below them. A context."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("measuring", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line as it is."""
        if self._bar is None:
            click.echo(text, err=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def measured(self, trial: Trial, done: int, total: int) -> None:
        """One measurement has ended."""
        settings = " ".join(f"{name}={value}" for name, value in trial.point.items())
        said = f"failed: {trial.error}" if trial.figures is None else brief(trial.figures)
        busy = "  (the running stack was busy)" if trial.busy else ""
        self.say(f"{done:>3}/{total} {trial.stage:<7} {settings}: {said}{busy}")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)


def brief(figures: Figures) -> str:
    """In a line."""
    unit = "requests/s" if figures.ttft_s is None else "tokens/s"
    parts = [f"{figures.throughput:.4g} {unit}", f"p99 latency {seconds(figures.latency_s)}"]
    if figures.ttft_s is not None:
        parts.append(f"first token {seconds(figures.ttft_s)}")
    if figures.itl_s is not None:
        parts.append(f"between tokens {seconds(figures.itl_s)}")
    return ", ".join(parts)


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return ""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def frontier(result: Result) -> tuple[list[str], list[tuple[list[str], bool]]]:
    """Titles, and rows with whether each is the winner's: the frontier, what is set, the finalists; fastest first."""
    from orchestrator.ops.tune.knobs import key

    generates = bool(result.plan.workload.output_tokens)
    names = [knob.name for knob in result.knobs]
    titles = [*names, "tokens/s" if generates else "requests/s", "latency p99"]
    titles += ["first token p99", "between tokens p99"] if generates else []
    line, verdicts = {key(point) for point, _ in result.frontier()}, {key(one.point): one for one in result.verdicts}
    wins = None if result.winner is None else key(result.winner.point)
    now = key(result.point)
    rows = []
    for point, figures in sorted(result.measured(), key=lambda one: -one[1].throughput):
        own = key(point)
        if own not in line and own not in verdicts and own != now:
            continue
        marks = ["winner"] if own == wins else []
        marks += ["set now"] if own == now else []
        marks += ["frontier"] if own in line else []
        marks += [] if result.bounds.kept(figures) else ["beyond the bounds"]
        ratio = f"{verdicts[own].ratio:.2f}" if own in verdicts else "1" if own == now else ""
        cells = [*(point[name] for name in names), f"{figures.throughput:.4g}", seconds(figures.latency_s)]
        cells += [seconds(figures.ttft_s), seconds(figures.itl_s)] if generates else []
        rows.append(([*cells, ratio, ", ".join(marks)], own == wins))
    return [*titles, "against now", ""], rows


def show_frontier(result: Result) -> None:
    """The table on standard output, and what has to be known to read it."""
    titles, rows = frontier(result)
    heads = [title.upper() for title in titles]
    table.show(heads, [cells for cells, _ in rows], right=heads[:-1])
    click.echo(f"load: {result.plan.workload}; bounds (p99): {result.bounds}")
    for note in result.notes:
        click.echo(f"note: {note}", err=True)


def known(subject: Subject, rows: Sequence[Row]) -> dict[str, Any]:
    """What was measured of one subject: each point's mean throughput, and that of each batch size; the best first."""
    from orchestrator.ops.tune.knobs import key

    points: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    sizes: dict[str, list[float]] = {}
    for row in rows:
        points.setdefault(key(row.point), []).append(row)
        size = next((row.point[name] for name in BATCH if name in row.point), None)
        if row.figures is not None and size is not None:
            sizes.setdefault(size, []).append(row.figures.throughput)
    measured = []
    for found in points.values():
        good = [row.figures for row in found if row.figures is not None]
        measured.append({
            "settings": dict(found[0].point), "measurements": len(found), "failed": len(found) - len(good),
            "mean_throughput": mean(one.throughput for one in good) if good else None,
            "mean_latency_p99_s": mean(one.latency_s for one in good) if good else None,
            "last": max(row.time for row in found),
        })  # fmt: skip
    batches = [{"batch_size": size, "measurements": len(v), "mean_throughput": mean(v)} for size, v in sizes.items()]
    return {
        "model": subject.model, "entry": subject.entry, "machine": subject.machine,
        "concurrency": subject.concurrency, "prompt_tokens": subject.prompt_tokens,
        "output_tokens": subject.output_tokens or None,
        "points": sorted(measured, key=lambda one: -(one["mean_throughput"] or 0.0)),
        "batch_sizes": sorted(batches, key=lambda one: -one["mean_throughput"]),
    }  # fmt: skip


def show_known(document: Mapping[str, Any]) -> None:
    """One subject's table on standard output."""
    from orchestrator.cli.keyflags import when

    answers = f", {document['output_tokens']} output tokens" if document["output_tokens"] else ""
    click.echo(
        f"{document['model']} (entry {document['entry']}) on {document['machine']}; "
        f"{document['concurrency']} clients, {document['prompt_tokens']} prompt tokens{answers}"
    )
    names = list(dict.fromkeys(name for row in document["points"] for name in row["settings"]))
    unit = "tokens/s" if document["output_tokens"] else "requests/s"
    titles = [*(name.upper() for name in names), f"MEAN {unit}", "MEAN LATENCY P99", "MEASURED", "FAILED", "LAST"]
    rows = [
        [
            *(row["settings"].get(name, "") for name in names),
            "" if row["mean_throughput"] is None else f"{row['mean_throughput']:.4g}",
            seconds(row["mean_latency_p99_s"]), str(row["measurements"]), str(row["failed"] or ""), when(row["last"]),
        ]
        for row in document["points"]
    ]  # fmt: skip
    table.show(titles, rows, right=titles[:-1])
    sizes = document["batch_sizes"]
    if sizes:
        told = ", ".join(f"{one['batch_size']}: {one['mean_throughput']:.4g} {unit}" for one in sizes)
        click.echo(f"batch sizes by mean throughput, the best first: {told}")
