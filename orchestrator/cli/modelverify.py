"""`truthgpt models verify`: whether what lies in the repository is what was exported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import table
from orchestrator.cli.base import Command, CommandError, json_option, print_json, settings_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.models import Entry, Version
    from orchestrator.ops.verification import Verdict

BAR_BYTES = 256 << 20  # from here on it takes long enough to show how far it is

_EPILOG = """\b
Examples:
  truthgpt models verify
  truthgpt models verify demo --version 1
  truthgpt models verify --all --json
"""


@click.command("verify", cls=Command, epilog=_EPILOG)
@click.argument("name", required=False)
@click.option("--version", "number", type=click.IntRange(min=1), metavar="N", help="A version.  [default: the newest]")
@click.option("--all", "every", is_flag=True, help="Every version.")
@json_option
@settings_options("model_repository")
def verify(settings: Settings, name: str | None, number: int | None, every: bool, as_json: bool) -> None:
    """Check every file of a model, or of all of them, against its manifest. Exits with 1 when anything is wrong.

    Looked for are damaged, missing and unlisted files, a manifest of an unknown format, a config.pbtxt that cannot be
    read or says something else, and whatever else would keep the version from being served on this machine.
    """
    from orchestrator import models

    if number is not None and (name is None or every):
        raise click.UsageError("--version needs a NAME and goes without --all")
    repository = settings.model_repository
    entries = models.read(repository) if name is None else [models.get(repository, name)]
    if number is not None:
        chosen = [(entries[0], entries[0].version(number))]
    else:
        chosen = [(entry, one) for entry in entries for one in (entry.versions if every else entry.versions[:1])]
    verdicts = _check(chosen)
    if as_json:
        print_json([_document(verdict) for verdict in verdicts])
    elif not verdicts:
        click.echo(f"{repository} has no models; `truthgpt export` adds one", err=True)
    else:
        _print(verdicts)
    bad = [verdict for verdict in verdicts if not verdict.ok]
    if bad:
        names = ", ".join(f"{verdict.name} version {verdict.version}" for verdict in bad)
        raise CommandError(f"{names} cannot be served", "export it again, or remove it with `truthgpt models remove`")


def _check(chosen: Sequence[tuple[Entry, Version]]) -> list[Verdict]:
    from orchestrator.ops import verification

    total = sum(verification.size(version) for _, version in chosen)
    if not sys.stderr.isatty() or total < BAR_BYTES:
        return [verification.verify(entry, version) for entry, version in chosen]
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verifying", total=total)
        return [
            verification.verify(entry, version, lambda count: bar.advance(task, count)) for entry, version in chosen
        ]


def _document(verdict: Verdict) -> dict[str, Any]:
    problems = [{"check": check, "message": text} for check, text in verdict.problems]
    return {
        "name": verdict.name, "version": str(verdict.version), "ok": verdict.ok, "files": verdict.files,
        "bytes": verdict.bytes, "problems": problems,
    }  # fmt: skip


def _print(verdicts: Sequence[Verdict]) -> None:
    rows = []
    for verdict in verdicts:
        result = "ok" if verdict.ok else "\n".join(text for _, text in verdict.problems)
        rows.append((verdict.name, str(verdict.version), str(verdict.files), _size(verdict.bytes), result))
    table.show(("NAME", "VERSION", "FILES", "SIZE", "RESULT"), rows, folds=("RESULT",))


def _size(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, _ = value / 1000, units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
