"""How `truthgpt bench` shows a run while it lasts, and its figures afterwards."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from orchestrator.bench.plan import Load, Progress
from orchestrator.bench.result import COMPARED, NOTHING, differences, figure, pairs, place, ratio
from orchestrator.cli.figures import seconds
from orchestrator.cli.table import show

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

REFRESH_S = 0.25
LINE_S = 10.0  # between two lines of progress where there is no terminal
BUSY = 0.8  # of one processor: beyond it the generator may be what is measured


class Bar:
    """A context manager: on a terminal a bar on standard error, else a line now and then, of how far a run is."""

    def __init__(self, load: Load, progress: Progress) -> None:
        self._what = place({"concurrency": load.concurrency, "rate": load.rate})
        self._progress = progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)

    def __enter__(self) -> Bar:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(2 * REFRESH_S)

    def _draw(self) -> None:
        if sys.stderr.isatty():
            self._bar()
            return
        while not self._ended.wait(LINE_S):
            click.echo(f"{self._what}: {self._words()}", err=True)

    def _words(self) -> str:
        now = self._progress
        of = "" if now.total is None else f" of {now.total}"
        return f"{now.stage}, {now.done}{of} requests" + (f", {now.errors} errors" if now.errors else "")

    def _bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Drawn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Drawn(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as drawn:
            task = drawn.add_task(self._what, total=None)
            while not self._ended.wait(REFRESH_S):
                self._update(drawn, task)

    def _update(self, drawn: RichProgress, task: Any) -> None:
        now = self._progress
        done, total = float(now.done), None if now.total is None else float(now.total)
        if total is None and now.until_s:
            done, total = min(now.until_s, time.monotonic() - now.began), now.until_s
        drawn.update(task, completed=done, total=total, description=f"{self._what}: {self._words()}")
        drawn.refresh()


def table(found: Mapping[str, Any]) -> None:
    """The figures of all runs, for people."""
    goals = any(run.get("goodput_per_s") is not None for run in found["runs"])
    encodes = found["target"].get("task") == "encode"
    titles = ["LOAD", "REQUESTS/S"]
    titles += ["GOOD/S"] if goals else []
    titles += [] if encodes else ["TOKENS/S", "FIRST TOKEN p50", "p90", "p99", "BETWEEN TOKENS p50", "p99 "]
    titles += ["LATENCY p50", "p99  ", "ERRORS"]
    rows = []
    for run in found["runs"]:
        row = [place(run), f"{run['requests_per_s']:.4g}"]
        row += [f"{run['goodput_per_s']:.4g}"] if goals else []
        if not encodes:
            row.append(f"{run['output_tokens_per_s']:.4g}")
            row += [seconds(figure(run, f"ttft_s.{name}")) for name in ("p50", "p90", "p99")]
            row += [seconds(figure(run, f"itl_s.{name}")) for name in ("p50", "p99")]
        row += [seconds(figure(run, f"latency_s.{name}")) for name in ("p50", "p99")]
        rows.append([*row, str(run["errors"])])
    show(titles, rows, right=titles[1:])


def warnings(found: Mapping[str, Any]) -> None:
    """What whoever reads the figures must know, on standard error."""
    for run in found["runs"]:
        where, load = place(run), run["load"]
        for kind, row in run["error_kinds"].items():
            click.echo(f"error: {where}: {row['count']} × {kind}: {row['first']}", err=True)
        if run["client_cpu"] > BUSY:
            told = f"this program used {run['client_cpu']:.0%} of a processor: the figures may be its own"
            click.echo(f"warning: {where}: {told}", err=True)
        mean, wanted = run["prompt_tokens_mean"], load["prompt_tokens"]
        if run["completed"] and wanted and mean and abs(mean - wanted) > 0.05 * wanted + 1:
            click.echo(f"warning: {where}: prompts had {mean:g} tokens, not {wanted}", err=True)
        if run["completed"] and found["target"].get("task") != "encode" and run["tokens_counted_by"] != "server":
            told = "the server counts no tokens: each piece of an answer counts as one"
            click.echo(f"warning: {where}: {told}", err=True)
        if run["gave_up"]:
            told = f"ended after {run['completed']} answers, for then nothing was answered any more"
            click.echo(f"warning: {where}: {told}", err=True)
        if run["interrupted"]:
            click.echo(f"warning: {where}: interrupted after {run['completed']} requests", err=True)


def comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What `--compare --json` prints: of each place of the sweep the ratios after to before."""
    runs = [
        {"concurrency": one.get("concurrency"), "rate": one.get("rate"),
         "ratios": {name: ratio(figure(one, name), figure(other, name)) for name in COMPARED}}
        for one, other in pairs(before, after)
    ]  # fmt: skip
    return {"runs": runs, "differences": differences(before, after)}


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """The same as a table."""
    rows = []
    for one, other in pairs(before, after):
        for name, more in COMPARED.items():
            values = figure(one, name), figure(other, name)
            if values == (None, None):
                continue
            change = ratio(*values)
            shown = [f"{value:.4g}" if value is not None else "-" for value in values]
            verdict = (
                "" if change is None or abs(change - 1) < NOTHING else "better" if (change > 1) == more else "worse"
            )
            rows.append([place(one), name, *shown, "-" if change is None else f"{change:.3f} ×", verdict])
    show(["LOAD", "FIGURE", "BEFORE", "AFTER", "RATIO", ""], rows, right=["BEFORE", "AFTER", "RATIO"])
    for text in differences(before, after):
        click.echo(f"warning: not measured alike: {text}", err=True)
