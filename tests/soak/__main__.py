"""`make soak`: a real stack under mixed load for some minutes, watched; a table, a line of JSON, and an exit code.

python -m tests.soak --minutes 20
"""

from __future__ import annotations

import sys

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from . import engine, report


@click.command()
@click.option("--minutes", default=20.0, show_default=True, help="How long to ask.")
@click.option("--rate", default=150.0, show_default=True, help="Requests a second.")
def main(minutes: float, rate: float) -> None:
    """Ask a stack of two workers everything at once and see whether something of it grows; 1 when it does."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("[bold]soak"), BarColumn(None), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn()
    )
    task = bar.add_task("soak", total=minutes * 60)
    console.print("starting a stack with two workers, keys, limits, cache, audit and metrics")
    with Live(bar, console=console, refresh_per_second=1) as live:

        def show(now: engine.Progress) -> None:
            bar.update(task, completed=now.elapsed_s)
            live.update(Group(report.moment(now), bar))

        result = engine.run(minutes * 60, rate, progress=show)
        live.update(report.table(result))
    for problem in result.problems:
        console.print(f"[red]{problem}", highlight=False)
    console.print("flat" if not result.problems else "not flat", style="bold")
    print(report.line(result), flush=True)
    sys.exit(1 if result.problems else 0)


if __name__ == "__main__":
    main()
