"""`truthgpt batch`: many requests from a file, through a gateway, into a file."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.base import INTERRUPTED, Command, Group, json_option, print_json, settings_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.ops.batch import Tally
    from orchestrator.ops.batchfile import Source
    from orchestrator.ops.batchjournal import Journal

LINE_S = 5.0  # between two lines of progress where there is no terminal
REFRESH_S = 0.2


@click.group("batch", cls=Group)
def batch() -> None:
    """Answer many requests from a file."""


_EPILOG = """\b
Examples:
  truthgpt batch run requests.jsonl --output answers.jsonl
  truthgpt batch run requests.jsonl --output answers.jsonl --concurrency 16 --json
  TRUTHGPT_API_KEY=... truthgpt batch run requests.jsonl --output answers.jsonl --url https://gateway.example
"""


@batch.command("run", cls=Command, epilog=_EPILOG, short_help="Answer every line of a file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="PATH", help="File of the answers.")
@click.option("--url", metavar="URL", help="Gateway to ask.  [default: the running stack's]")
@click.option("--concurrency", type=click.IntRange(1, 1024), metavar="N",
              help="Requests at the same time.  [default: the slots of the gateway's models]")  # fmt: skip
@click.option("--retries", type=click.IntRange(0, 100), default=6, show_default=True, metavar="N",
              help="Further attempts of a line after failures that may pass.")  # fmt: skip
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help="Give a line up after this long, waits included.  [default: request_timeout_s]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@json_option
@settings_options("home")
def run(
    settings: Settings, file: Path, output: Path, url: str | None, concurrency: int | None, retries: int,
    timeout_s: float | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Answer every line of FILE, in the form of OpenAI's batch API, and write the answers in the same order.

    A line of FILE is {"custom_id", "method": "POST", "url": "/v1/chat/completions" | "/v1/completions" |
    "/v1/embeddings" | "/v1/classify", "body"}; a line of the output is {"id", "custom_id", "response": {"status_code",
    "request_id", "body"}, "error": null}, or with "response": null and "error": {"code", "message", "line"} where there
    was no answer. A line that is wrong or fails fails no other.

    A rate limit (429) is waited out; 5xx, 408, 409 and lost connections are tried again. Answers are kept in
    OUTPUT.partial as they come: after an interruption, or kill -9, the same command goes on where it ended, and no line
    is lost or twice in the output.

    --json prints total, succeeded and failed (over all runs), skipped (those done before), output, duration_s and
    output_tokens. Exit code 0 if every line was answered with 2xx, 1 if not.
    """
    from orchestrator.ops.batch import Tally
    from orchestrator.ops.batchfile import Source
    from orchestrator.ops.batchjournal import Journal

    if "-" in (str(file), str(output)):
        raise click.UsageError("a batch resumes from its files, so neither can be `-`; save standard input to a file")
    if not file.is_file():
        raise click.UsageError(f"{file} is not a file")
    if output.exists() and not overwrite:
        raise click.UsageError(f"{output} exists already; choose another --output, or give --overwrite")
    if not output.absolute().parent.is_dir():
        raise click.UsageError(f"{output.parent} is not a folder")
    source = Source.open(file)
    tally = Tally(source.lines)
    journal = Journal.open(output, source, overwrite, tally.keep)
    try:
        limit_s = settings.request_timeout_s if timeout_s is None else timeout_s
        whole = asyncio.run(_answer(settings, source, journal, tally, url, concurrency, retries, limit_s))
        if whole:
            journal.finish()
    finally:
        journal.close()
    if not whole:
        click.echo(
            f"stopped: {tally.done} of {tally.total} lines are done; the same command goes on from here", err=True
        )
        raise click.exceptions.Exit(INTERRUPTED)
    _report(tally, output, as_json)
    if tally.failed:
        raise click.exceptions.Exit(1)


async def _answer(
    settings: Settings, source: Source, journal: Journal, tally: Tally, url: str | None, concurrency: int | None,
    retries: int, timeout_s: float,
) -> bool:  # fmt: skip
    """Ask what is not done; whether all is done now. Ctrl-C and SIGTERM end it early."""
    from orchestrator.cli import stack
    from orchestrator.ops.batch import run
    from orchestrator.ops.batchclient import Asker, slots

    if tally.done == tally.total:  # it was killed before its last step
        return True
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    url = url or stack.require(settings).http
    at_once = concurrency or await slots(url, settings.api_key)
    async with Asker(url, settings.api_key, at_once, retries, timeout_s) as asker, _progress(tally):
        return await run(source, journal, tally, asker, stop)


@asynccontextmanager
async def _progress(tally: Tally) -> AsyncIterator[None]:
    """Shows the counts on standard error while the context lasts: a bar on a terminal, else a line now and then."""
    task = asyncio.create_task(_bar(tally) if sys.stderr.isatty() else _lines(tally))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _lines(tally: Tally) -> None:
    while True:
        await asyncio.sleep(LINE_S)
        click.echo(f"{tally.done} of {tally.total} lines done, {_counts(tally)}", err=True)


async def _bar(tally: Tally) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[counts]}"))
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("", total=tally.total, counts="")
        try:
            while True:
                bar.update(task, completed=tally.done, counts=_counts(tally), refresh=True)
                await asyncio.sleep(REFRESH_S)
        finally:
            bar.update(task, completed=tally.done, counts=_counts(tally), refresh=True)


def _counts(tally: Tally) -> str:
    left = "" if tally.left_s is None else f", {_duration(tally.left_s)} left"
    return f"{tally.failed} failed, {tally.rate:.1f}/s{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _report(tally: Tally, output: Path, as_json: bool) -> None:
    if as_json:
        print_json({
            "total": tally.total, "succeeded": tally.succeeded, "failed": tally.failed, "skipped": tally.skipped,
            "output": str(output), "duration_s": round(tally.duration_s, 3), "output_tokens": tally.output_tokens,
        })  # fmt: skip
        return
    before = f" ({tally.skipped} of them before)" if tally.skipped else ""
    click.echo(f"{output}: {tally.succeeded} of {tally.total} lines succeeded, {tally.failed} failed{before}")
    click.echo(f"{tally.output_tokens} tokens in {_duration(tally.duration_s)}")
    for reason, count in tally.reasons.items():
        click.echo(f"  {count} x {reason}")
