"""`truthgpt audit`: reading the audit log and checking that nobody has changed it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.cli.base import Command, Group, json_option, print_json, settings_options
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.ops.auditread import Wanted

_F = TypeVar("_F", bound=Callable[..., Any])


@click.group("audit", cls=Group)
def audit() -> None:
    """Read, check and copy the audit log: who asked for what and when, and what was refused or changed.

    Callers, addresses and prompts stand in it as keyed hashes; `truthgpt audit hash` makes the hash to look for.
    docs/audit.md says what is written and what the chain of hashes proves.
    """


class _Moment(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions of click
    """A date, a time, or how long ago."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from orchestrator.ops.auditread import when

        try:
            return when(str(value), time.time())
        except (ValueError, OverflowError, OSError):
            self.fail(f"{value!r} is no time such as 2026-11-22, 2026-11-22T18:00:00Z or 24h (ago)", param, ctx)


class _Event(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # as above
    name = "event"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from orchestrator.auditevents import EVENTS

        if value not in EVENTS:
            self.fail(f"{value!r} is none of {', '.join(EVENTS)}", param, ctx)
        return str(value)


def _filters(function: _F) -> _F:
    for name, what in (("--until", "Before this moment."), ("--since", "From this moment on: a date, a time, or 24h.")):
        function = click.option(name, type=_Moment(), metavar="TIME", help=what)(function)
    return _event_option(function)


def _event_option(function: _F) -> _F:
    option = click.option(
        "--event", "events", type=_Event(), multiple=True, metavar="EVENT", help="Of this kind only: generation, "
        "error, security, performance, start, stop, lost or recovered. May be given several times.",
    )  # fmt: skip
    return option(function)


_TAIL_EPILOG = """\b
Examples:
  truthgpt audit tail
  truthgpt audit tail -n 50 --event security --event error
  truthgpt audit tail --follow
"""


@audit.command("tail", cls=Command, epilog=_TAIL_EPILOG)
@click.option("-n", "--lines", "count", type=click.IntRange(0, 100_000), default=10, show_default=True, metavar="N",
              help="How many.")  # fmt: skip
@click.option("--follow", "-f", is_flag=True, help="Go on with what is written, until interrupted.")
@_event_option
@json_option
@settings_options("home")
def tail(settings: Settings, count: int, follow: bool, events: tuple[str, ...], as_json: bool) -> None:
    """Show the newest events, oldest first."""
    from orchestrator.auditlog import folder_of
    from orchestrator.cli import auditshow
    from orchestrator.ops import auditread

    if follow and as_json:
        raise click.UsageError("--json is one document, which --follow never ends; give one of them")
    folder, wanted = folder_of(settings.home), auditread.Wanted(events)
    last = auditread.tail(folder, 1, auditread.Wanted())
    rows = auditread.tail(folder, count, wanted)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(auditshow.shown(row))
    if follow:
        # what came between the two readings is new, too
        for row in auditread.follow(folder, max([row["seq"] for row in (*last, *rows)], default=0), wanted):
            click.echo(auditshow.shown(row))
            sys.stdout.flush()


_VERIFY_EPILOG = """\b
Examples:
  truthgpt audit verify
  truthgpt audit verify --mark 1204:9a3c5f0e7b1d2c4a6e8f00112233aabb
  truthgpt audit verify --first 50001 --json
"""


@audit.command("verify", cls=Command, epilog=_VERIFY_EPILOG)
@click.option("--mark", metavar="N:HASH", help="A line that has to be in the chain: what an earlier check ended with.")
@click.option("--first", type=click.IntRange(1), metavar="N", help="Begin with line N, where those before it were "
              "removed on purpose.  [default: 1]")  # fmt: skip
@json_option
@settings_options("home")
def verify(settings: Settings, mark: str | None, first: int | None, as_json: bool) -> None:
    """Check every line of the audit log, over all its files; exit code 0 only if nothing was changed.

    Says the first place where the chain of hashes is broken. Keep the mark that it ends with somewhere else: --mark
    later proves that the log still has everything up to there.
    """
    from orchestrator.auditlog import Mark
    from orchestrator.cli import auditshow
    from orchestrator.ops import auditcheck, auditing

    known = None
    if mark is not None:
        found = re.fullmatch(r"([1-9]\d{0,18}):([0-9a-f]{32})", mark)
        if found is None:
            raise click.BadParameter("must be a line's number, a colon and its hash", param_hint="--mark")
        known = Mark(int(found[1]), found[2])
    folder, prints = auditing.folder_and_key(settings)
    with auditshow.reading(folder) as progress:
        report = auditcheck.verify(folder, prints, first, known, progress)
    if as_json:
        print_json(auditshow.document(report))
    else:
        auditshow.tell(report)
    if report.broken is not None:
        raise click.exceptions.Exit(1)


_STATS_EPILOG = """\b
Examples:
  truthgpt audit stats
  truthgpt audit stats --since 24h --top 5
  truthgpt audit stats --event security --json
"""


@audit.command("stats", cls=Command, epilog=_STATS_EPILOG)
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, metavar="N",
              help="Models and callers, those with the most events.")  # fmt: skip
@_filters
@json_option
@settings_options("home")
def stats(
    settings: Settings, top: int, events: tuple[str, ...], since: str | None, until: str | None, as_json: bool
) -> None:
    """Count events, outcomes, errors, models and callers. Callers are hashes: see `truthgpt audit hash --as caller`."""
    from orchestrator.auditlog import folder_of
    from orchestrator.cli import auditshow
    from orchestrator.ops import auditread

    folder = folder_of(settings.home)
    with auditshow.reading(folder) as progress:
        found = auditread.stats(folder, auditread.Wanted(events, since or "", until or ""), progress)
    counts = {
        "events": dict(found.events.most_common()), "outcomes": dict(found.outcomes.most_common()),
        "errors": dict(found.errors.most_common()), "models": dict(found.models.most_common(top)),
        "callers": dict(found.callers.most_common(top)),
    }  # fmt: skip
    if as_json:
        print_json({
            "lines": found.lines, "first": found.first or None, "last": found.last or None, **counts,
            "only_counted": found.only_counted, "lost": found.lost, "unreadable": found.unreadable,
        })  # fmt: skip
        return
    click.echo(f"{found.lines} events{f' from {found.first} to {found.last}' if found.lines else ''}")
    for name, rows in counts.items():
        for label, number in rows.items():
            click.echo(f"{name[:-1]:<8} {number:>9}  {label}")
    for number, what in (
        (found.only_counted, "more of floods, which were only counted"), (found.lost, "lost"),
        (found.unreadable, "lines that are none of the audit log's"),
    ):  # fmt: skip
        if number:
            click.echo(f"{number} {what}")


_EXPORT_EPILOG = """\b
Examples:
  truthgpt audit export --since 2026-11-01 --until 2026-12-01 --output november.jsonl
  truthgpt audit export --event security --format csv > security.csv
"""


@audit.command("export", cls=Command, epilog=_EXPORT_EPILOG)
@click.option("--format", "form", type=click.Choice(("jsonl", "csv")), default="jsonl", show_default=True,
              help="Lines as they are, hashes included, or a table.")  # fmt: skip
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), metavar="PATH", help="A file, put in "
              "place once it is complete; readable by its owner alone.  [default: standard output]")  # fmt: skip
@_filters
@settings_options("home")
def export(
    settings: Settings, form: str, output: Path | None, events: tuple[str, ...], since: str | None, until: str | None
) -> None:
    """Copy events. A copy of some lines proves little by itself: run `truthgpt audit verify` on the log first."""
    from orchestrator.auditlog import folder_of
    from orchestrator.ops import auditread

    wanted = auditread.Wanted(events, since or "", until or "")
    if output is None or str(output) == "-":
        auditread.export(folder_of(settings.home), wanted, form, sys.stdout)
        return
    count = _export_to(output, folder_of(settings.home), wanted, form)
    click.echo(f"{output}: {count} events", err=True)


_HASH_EPILOG = """\b
Examples:
  printf 'Hola, ¿cómo estás?' | truthgpt audit hash
  echo k2s7dhq3mzpa | truthgpt audit hash --as caller
  echo 192.0.2.7 | truthgpt audit hash --as caller
  echo '[{"role": "user", "content": "Hola"}]' | truthgpt audit hash --as messages
"""


@audit.command("hash", cls=Command, epilog=_HASH_EPILOG)
@click.option("--as", "kind", type=click.Choice(("text", "messages", "tokens", "texts", "caller")), default="text",
              show_default=True, help="What standard input is: a prompt; JSON messages, token ids or texts; a key's id "
              "or an address.")  # fmt: skip
@click.option(
    "--exact", is_flag=True, help="The text ends as standard input ends.  [default: without its last newline]"
)
@settings_options("home")
def hash_(settings: Settings, kind: str, exact: bool) -> None:
    """Print the hash by which standard input stands in the audit log.

    A prompt is looked for as it was sent, before sanitising: input_hash. A caller is a key's id, an address, or
    user-NAME for commands: caller, address, subject.
    """
    from orchestrator.ops import auditing

    data = sys.stdin.buffer.read()
    if not exact:
        data = data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\r\n") else data.removesuffix(b"\n")
    click.echo(auditing.hash_of(auditing.folder_and_key(settings)[1], kind, data))


def _export_to(output: Path, folder: Path, wanted: Wanted, form: str) -> int:
    import tempfile

    from orchestrator.ops import auditread

    handle, name = tempfile.mkstemp(dir=output.absolute().parent, prefix=f".{output.name}-")  # created 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            count = auditread.export(folder, wanted, form, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, output)
    except BaseException:
        os.unlink(name)
        raise
    return count
