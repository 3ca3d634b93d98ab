"""`make soak`: a real stack under mixed load for some minutes, watched; a table, a line of JSON, and an exit code.

python -m tests.soak --minutes 20
"""

from __future__ import annotations

import sys

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from . import control, engine, report


@click.command()
@click.option("--minutes", default=20.0, show_default=True, help="How long to ask.")
@click.option("--rate", default=150.0, show_default=True, help="Requests a second.")
@click.option("--requests", type=click.IntRange(1000), help="End after so many, however long it takes.")
@click.option("--control/--no-control", "controlled", default=True, help="Show first that a leak would be found.")
def main(minutes: float, rate: float, requests: int | None, controlled: bool) -> None:
    """Ask a stack of two workers everything at once and see whether something of it grows; 1 when it does.

    First a stack that leaks on purpose is asked for some seconds: what is not found there cannot be shown to be flat.
    """
    console = Console(stderr=True)
    missed: list[str] = []
    if controlled:
        with console.status("the negative control: a stack whose workers and stub keep something of each request"):
            missed = control.unseen(control.leaking())
        for problem in missed:
            console.print(f"[red]{problem}", highlight=False)
        console.print(f"negative control: {len(control.LEAKS) - len(missed)} of {len(control.LEAKS)} leaks found")
    if requests is not None:
        minutes = requests / rate / 60 / engine.FLOOR
    bar = Progress(
        TextColumn("[bold]soak"), BarColumn(None), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn()
    )
    task = bar.add_task("soak", total=minutes * 60)
    console.print("starting a stack with two workers, keys, limits, cache, audit and metrics")
    with Live(bar, console=console, refresh_per_second=1) as live:

        def show(now: engine.Progress) -> None:
            done = now.elapsed_s if requests is None else now.requests
            bar.update(task, completed=done, total=minutes * 60 if requests is None else requests)
            live.update(Group(report.moment(now), bar))

        result = engine.run(minutes * 60, rate, progress=show, requests=requests)
        live.update(report.table(result))
    for problem in result.problems:
        console.print(f"[red]{problem}", highlight=False)
    console.print("flat" if not result.problems else "not flat", style="bold")
    print(report.line(result, None if not controlled else not missed), flush=True)
    sys.exit(1 if result.problems or missed else 0)


if __name__ == "__main__":
    main()
