"""`truthgpt top`: how the stack is doing, live at a terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.base import Command, CommandError, json_option, print_json, settings_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType

_EPILOG = """\b
Examples:
  truthgpt top
  truthgpt top --interval 10
  truthgpt top --once --json
"""
_BARS = "▁▂▃▄▅▆▇█"
_SEEN = 60


@click.command("top", cls=Command, epilog=_EPILOG, short_help="Keep the stack's figures live at the terminal.")
@click.option("--interval", type=click.FloatRange(0.5, 3600), default=2.0, show_default=True, metavar="S",
              help="Seconds between two looks.")  # fmt: skip
@click.option("--once", is_flag=True, help="Show it once and end; so does an output that is no terminal.")
@json_option
@settings_options("home")
def top(settings: Settings, interval: float, once: bool, as_json: bool) -> None:
    """Show models, rates, latencies, memory, jobs and alerts of the running stack until interrupted.

    The curves are those of the time since the command began, rates and latencies of the last minute. With --once the
    exit code is 0 if the stack is ready to serve, 1 if not.
    """
    from orchestrator.cli import stack

    if as_json and not once:
        raise click.UsageError("--json is one document: give --once with it")
    found = stack.report(settings)
    if not found["running"] and not as_json:
        raise CommandError(found["detail"], "`truthgpt up --detach` starts one")
    if not once and sys.stdout.isatty():
        _live(settings, interval)
        return
    if as_json:
        print_json(found)
    else:
        _print(found)
    if not found["ready"]:
        raise click.exceptions.Exit(1)


def _print(found: dict[str, Any]) -> None:
    from orchestrator.cli.status import shown

    for line in shown(found):
        click.echo(line)


def _live(settings: Settings, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from orchestrator.cli import stack

    curves: dict[str, deque[float]] = {}
    with Live(console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            live.update(_frame(stack.report(settings), curves), refresh=True)
            time.sleep(max(0.1, began + interval - time.monotonic()))


def _frame(found: dict[str, Any], curves: dict[str, deque[float]]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from orchestrator.cli import figures
    from orchestrator.cli.status import shown

    head = Text(time.strftime("%H:%M:%S  ")) + Text("truthgpt top", style="bold") + Text("   Ctrl-C ends it", "dim")
    if not found["running"]:
        return Group(head, Text(""), Text(f"{found['detail']}", style="red"))
    minute = (found["figures"] or {}).get("minute") or {}
    table = Table(box=None, pad_edge=False, show_header=False)
    p95, tokens, requests = (minute.get("latency_s") or {}).get("p95"), "tokens_per_s", "requests_per_s"
    for what, value, text in (
        ("requests a second", minute.get(requests), f"{minute.get(requests, 0):g}"),
        ("failed", minute.get("error_rate"), f"{minute.get('error_rate', 0):.1%}"),
        ("latency p95", p95, figures.seconds(p95)),
        ("tokens a second", minute.get(tokens), f"{minute.get(tokens, 0):g}"),
    ):
        curve = curves.setdefault(what, deque(maxlen=_SEEN))
        curve.append(value or 0.0)
        table.add_row(what, Text(text, justify="right"), Text(sparkline(curve), style="cyan"))
    lines = shown(found)
    style = "green" if found["ready"] else "red"
    body = [Text(line, style=style if index == 0 else "", overflow="fold") for index, line in enumerate(lines)]
    why = [] if found["ready"] else [Text(found["detail"], style="red")]
    return Group(head, Text(""), *body, *why, Text(""), table)


def sparkline(values: deque[float]) -> str:
    """A curve of block characters, its highest value the full block."""
    highest = max(values, default=0.0)
    return "".join(_BARS[min(7, int(value / highest * 7.999))] if highest else _BARS[0] for value in values)
