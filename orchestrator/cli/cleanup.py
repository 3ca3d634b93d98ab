"""`truthgpt cleanup`: what nobody needs any more, shown or removed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from orchestrator.cli import table
from orchestrator.cli.base import Command, CommandError, Group, audited, json_option, print_json, settings_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.ops.cleanwork import Item, Tally


class _Name(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions of click
    """A target."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from orchestrator.ops.cleanup import TARGETS

        if value not in TARGETS:
            self.fail(f"{value!r} is none of {', '.join(TARGETS)}", param, ctx)
        return value


@click.group("cleanup", cls=Group)
def cleanup() -> None:
    """Show or remove what nobody needs any more: old logs, cached files, leftovers, metric history, old versions of
    models, orphaned shared memory, old files of the audit log.

    The jobs do the same by themselves: `truthgpt jobs list`. docs/maintenance.md says what goes and what never does.
    """


_PLAN_EPILOG = """\b
Examples:
  truthgpt cleanup plan
  truthgpt cleanup plan models --json
"""


@cleanup.command("plan", cls=Command, epilog=_PLAN_EPILOG)
@click.argument("names", nargs=-1, type=_Name(), metavar="[NAME]...")
@json_option
@settings_options("model_repository", "home")
def plan(settings: Settings, names: tuple[str, ...], as_json: bool) -> None:
    """Show what `truthgpt cleanup run` would remove, and why. Nothing is changed."""
    from orchestrator.ops import cleanup as ops
    from orchestrator.ops.cleanwork import Work
    from orchestrator.ops.redis import NoRedis, connect
    from orchestrator.ops.serving import elsewhere

    wanted = names or tuple(ops.TARGETS)
    try:
        with connect(settings) as client:
            work = Work(dry=True, elsewhere=elsewhere(settings, client))
            tallies = ops.clean(settings, work, wanted)
    except NoRedis:
        work = Work(dry=True, elsewhere=elsewhere(settings, None))
        tallies = ops.clean(settings, work, wanted)
    if as_json:
        items = [
            {"what": item.what, "path": item.path, "bytes": item.bytes, "age_s": item.age_s, "why": item.why}
            for item in work.items
        ]
        print_json({"items": items, "omitted": work.omitted, **_totals(tallies)})
    else:
        _show_items(work.items, work.omitted)
        _tell(tallies, "to remove")
    _exit(tallies)


_RUN_EPILOG = """\b
Examples:
  truthgpt cleanup run
  truthgpt cleanup run logs cache
"""


@cleanup.command("run", cls=Command, epilog=_RUN_EPILOG)
@click.argument("names", nargs=-1, type=_Name(), metavar="[NAME]...")
@json_option
@settings_options("model_repository", "home")
def run(settings: Settings, names: tuple[str, ...], as_json: bool) -> None:
    """Remove it. Works without Redis, too; where there is one, not beside a job that does the same at this moment."""
    from orchestrator.ops import cleanrun, jobrun
    from orchestrator.ops import cleanup as ops

    _check_folders(settings, names)
    tallies: list[Tally] = []
    try:
        try:
            warn = partial(click.echo, err=True)
            cleanrun.run(settings, names or tuple(ops.TARGETS), lambda text: warn(f"warning: {text}"), tallies)
        finally:  # also ended in the middle it says what is gone
            removed = [f"{tally.name} {tally.count}" for tally in tallies if tally.count]
            if removed:
                audited(settings, "cleanup run", detail=", ".join(removed))
            if as_json:
                print_json(_totals(tallies))
            else:
                _tell(tallies, "removed")
    except jobrun.Stopped:
        click.echo("error: it was told to end before it was done", err=True)
        raise click.exceptions.Exit(143) from None
    _exit(tallies)


def _check_folders(settings: Settings, names: tuple[str, ...]) -> None:
    """Whoever names a target means a folder that is there. Raises CommandError."""
    from orchestrator.jobs.table import JOBS, REPOSITORY

    for name in names:
        repository = JOBS[name].scope == REPOSITORY
        folder = settings.model_repository if repository else settings.home
        if not folder.is_dir():
            what, flag = ("model repository", "--model-repository") if repository else ("home", "--home")
            raise CommandError(f"there is no {what} {folder} with {name} to clean up", f"name another one with {flag}")


def _totals(tallies: list[Tally]) -> dict[str, object]:
    return {
        "targets": [tally.document() for tally in tallies],
        "count": sum(tally.count for tally in tallies),
        "bytes": sum(tally.bytes for tally in tallies),
    }


def _show_items(items: list[Item], omitted: int) -> None:
    rows = [
        (item.what, str(item.bytes), "" if item.age_s is None else _age(item.age_s), item.why, _printable(item.path))
        for item in items
    ]
    if rows:
        table.show(("WHAT", "BYTES", "AGE", "WHY", "PATH"), rows, folds=("WHY", "PATH"))
    if omitted:
        click.echo(f"… and {omitted} more")


def _tell(tallies: list[Tally], verb: str) -> None:
    for tally in tallies:
        click.echo(f"{tally.name}: {tally.count} {verb}, {tally.bytes} bytes")
        for text in tally.notes:
            click.echo(f"note: {_printable(text)}", err=True)
        for text in tally.errors:
            click.echo(f"error: {_printable(text)}", err=True)
        if tally.failed > len(tally.errors):
            click.echo(f"error: … and {tally.failed - len(tally.errors)} more", err=True)


def _exit(tallies: list[Tally]) -> None:
    if any(tally.failed for tally in tallies):
        raise click.exceptions.Exit(1)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _printable(text: str) -> str:
    """What a terminal may be given."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
