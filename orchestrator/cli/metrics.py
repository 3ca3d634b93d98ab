"""`truthgpt metrics`: the course of a deployment's figures, without a Prometheus."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.base import Command, CommandError, Group, json_option, settings_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.ops.metrichistory import Step


@click.group("metrics", cls=Group)
def metrics() -> None:
    """Look at the metric history. What Prometheus reads is on the ops port: docs/metrics.md."""


class _Moment(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions of click
    """A date, a time (UTC where it names no zone), or how long ago; as Unix time."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from datetime import datetime

        from orchestrator.ops.auditread import when

        if isinstance(value, float):
            return value
        try:
            return datetime.fromisoformat(when(str(value), time.time())).timestamp()
        except (ValueError, OverflowError, OSError):
            self.fail(f"{value!r} is no time such as 2026-11-22, 2026-11-22T18:00:00Z or 24h (ago)", param, ctx)


class _Duration(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # as above
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from orchestrator.keys import parse_duration

        try:
            seconds = parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if seconds < 60:
            self.fail("there is one line a minute: a step is at least 1m", param, ctx)
        return seconds


_HISTORY_EPILOG = """\b
Examples:
  truthgpt metrics history
  truthgpt metrics history --since 2h --step 5m
  truthgpt metrics history --since 2026-11-20 --until 2026-11-21
  truthgpt metrics history --since 7d --csv > week.csv
  truthgpt metrics history --since 10m --json
"""


@metrics.command("history", cls=Command, epilog=_HISTORY_EPILOG)
@click.option("--since", type=_Moment(), default="24h", show_default=True, metavar="TIME",
              help="From this moment on: a date, a time, or how long ago.")  # fmt: skip
@click.option("--until", type=_Moment(), metavar="TIME", help="Before this moment.  [default: now]")
@click.option("--step", "step_s", type=_Duration(), metavar="DURATION", help="Time that a row of the table stands for, "
              "at least 1m.  [default: so that some 24 are shown]")  # fmt: skip
@click.option("--csv", "as_csv", is_flag=True, help="Print the main figures of every line as CSV.")
@json_option
@settings_options("home")
def history(
    settings: Settings, since: float, until: float | None, step_s: int | None, as_csv: bool, as_json: bool
) -> None:
    """Show how requests, errors, latency, tokens and memory went: a line a minute is kept, of `metrics_days` days.

    Rates are those of all gateways that write into this home, p95 is the slowest and memory the fullest in each row.
    --json prints every line as it is, --csv its main figures.
    """
    from itertools import chain

    from orchestrator.monitor.history import folder_of, read
    from orchestrator.ops import metrichistory

    if as_csv and as_json:
        raise click.UsageError("--csv and --json are two forms; give one of them")
    until = time.time() + 1.0 if until is None else until
    if since >= until:
        raise click.UsageError("--since has to be before --until")
    if not folder_of(settings.home).is_dir():
        raise CommandError(
            f"there is no metric history in {settings.home}",
            "a gateway writes one while it runs, unless `monitoring` is off; --home names another place",
        )
    rows = read(settings.home, since, until)
    if as_json:
        _print_json(rows)
        return
    if as_csv:
        for line in metrichistory.table(rows):
            click.echo(line, nl=False)
        return
    first = next(rows, None)
    if first is None:
        click.echo("nothing was written in this time")
        return
    step_s = step_s or metrichistory.step_for(until - since)
    _show(metrichistory.steps(chain([first], rows), step_s), step_s)


def _print_json(rows: Any) -> None:
    """One list, line by line: a month of it need not be in memory."""
    import json

    between = "["
    for row in rows:
        click.echo(f"{between}\n  {json.dumps(row, ensure_ascii=False)}", nl=False)
        between = ","
    click.echo("[]" if between == "[" else "\n]")


_BARS = 60  # as many of the newest steps are drawn as fit beside their heading

# heading, value, how it is written
_COLUMNS: tuple[tuple[str, Callable[[Step], float | None], Callable[[float], str]], ...] = (
    ("requests/s", lambda step: step.requests_per_s, lambda value: f"{value:.2f}"),
    ("errors", lambda step: step.errors, lambda value: f"{value:.1%}"),
    ("p95", lambda step: step.p95_s, lambda value: f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"),
    ("tokens/s", lambda step: step.tokens_per_s, lambda value: f"{value:.1f}"),
    ("memory", lambda step: step.memory, lambda value: f"{value:.0%}"),
)


def _show(found: list[Step], step_s: int) -> None:
    from orchestrator.monitor.history import stamp
    from orchestrator.ops.metrichistory import sparkline

    click.echo(f"{'time (UTC)':<17}" + "".join(f"{heading:>12}" for heading, *_ in _COLUMNS))
    for step in found:
        cells = [(value(step), form) for _, value, form in _COLUMNS]
        shown = [f"{'–' if number is None else form(number):>12}" for number, form in cells]
        click.echo(f"{stamp(step.at)[:16].replace('T', ' '):<17}" + "".join(shown))
    if sys.stdout.isatty() and len(found) > 1:
        at = {step.at: step for step in found}
        last, count = found[-1].at, min(_BARS, round((found[-1].at - found[0].at) / step_s) + 1)
        shown_steps = [at.get(last - step_s * (count - 1 - number)) for number in range(count)]
        click.echo()
        for heading, value, form in _COLUMNS:
            course = [None if step is None else value(step) for step in shown_steps]
            known = [number for number in course if number is not None]
            if known:
                click.echo(f"{heading:<17}{sparkline(course)}  at most {form(max(known))}")
