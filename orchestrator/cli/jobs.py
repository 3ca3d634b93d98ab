"""`truthgpt jobs`: the scheduled jobs, their times, their last runs."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import table
from orchestrator.cli.base import (
    Command,
    CommandError,
    Group,
    audited,
    json_option,
    print_json,
    settings_options,
)
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.jobs.ledger import Run
    from orchestrator.jobs.table import Job


class _JobName(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions of click
    """A job of the table."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from orchestrator.jobs.table import JOBS

        if value not in JOBS:
            self.fail(f"{value!r} is none of {', '.join(JOBS)}", param, ctx)
        return JOBS[value]


@click.group("jobs", cls=Group)
def jobs() -> None:
    """List, run, pause and resume the jobs that keep a deployment well by themselves.

    Each runs once when it is due, whatever the number of replicas. docs/maintenance.md says what they do.
    """


_LIST_EPILOG = """\b
Examples:
  truthgpt jobs list
  truthgpt jobs list --json
"""


@jobs.command("list", cls=Command, epilog=_LIST_EPILOG)
@json_option
@settings_options("model_repository", "home")
def list_jobs(settings: Settings, as_json: bool) -> None:
    """List every job: when it is due (UTC), how its last run ended, when the next one is.

    Without Redis only the schedules are known.
    """
    from orchestrator.ops import joblist
    from orchestrator.ops.redis import NoRedis, connect

    try:
        with connect(settings) as client:
            rows = joblist.rows(settings, client, time.time())
    except NoRedis as error:
        rows = joblist.rows(settings, None, time.time())
        click.echo(f"warning: {error}: of their runs nothing is known", err=True)
    if as_json:
        times = ("last_run", "last_success", "next_run")
        print_json([{**row, **{name: _stamp(row[name]) for name in times}} for row in rows])
        return
    table.show(
        ("NAME", "SCHEDULE", "LAST RUN", "RESULT", "NEXT (UTC)", "STATE"),
        [
            (row["name"], row["schedule"] or "off", _short(row["last_run"]) or "never", row["last_result"] or "",
             _short(row["next_run"]), "running" if row["running"] else "paused" if row["paused"] else "")
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        if row["error"]:
            click.echo(f"{row['name']} failed: {_printable(row['error'])}")


_RUN_EPILOG = """\b
Examples:
  truthgpt jobs run logs
  truthgpt jobs run backup
"""


@jobs.command("run", cls=Command, epilog=_RUN_EPILOG)
@click.argument("job", type=_JobName(), metavar="NAME")
@click.option("--force", is_flag=True, help="Also while it is paused.")
@click.option("--scheduled", is_flag=True, hidden=True, help="Only if it is due.")
@click.option("--parent", type=int, hidden=True, help="The process that starts it, with which it ends.")
@json_option
@settings_options("model_repository", "home")
def run(settings: Settings, job: Job, force: bool, scheduled: bool, parent: int | None, as_json: bool) -> None:
    """Run a job now, whether it is due or not; exit code 1 where it fails. Times up to now are done by it."""
    if parent is not None:
        from orchestrator.jobs.process import become_child_of

        become_child_of(parent)
    from orchestrator.jobs.ledger import PAUSED, RUNNING, Claim
    from orchestrator.jobs.process import RAN_AND_FAILED
    from orchestrator.ops import jobrun
    from orchestrator.ops.redis import connect, connect_to

    own = settings.redis_url if scheduled else None  # the one that says that it is due
    try:
        with connect(settings) if own is None else connect_to(own) as client:
            ended = jobrun.run(settings, job, client, scheduled=scheduled, force=force)
    except jobrun.Stopped:
        sys.exit(143)
    if isinstance(ended, Claim):
        if scheduled:  # somebody else was quicker
            return
        if ended.outcome == RUNNING:
            raise CommandError(f"{job.name} is running ({ended.holder})", "wait until it has ended")
        if ended.outcome == PAUSED:
            raise CommandError(f"{job.name} is paused", f"`truthgpt jobs resume {job.name}`, or give --force")
        raise CommandError(f"{job.name} was not run: {ended.outcome}", "see `truthgpt jobs history`")
    if as_json:
        print_json(_document(ended))
    elif ended.result == "ok":
        click.echo(f"{job.name}: {ended.did or 'done'} ({ended.seconds:.1f} s)")
    if ended.result != "ok":
        if not as_json:
            click.echo(f"error: {job.name}: {_printable(ended.error)}", err=True)
            click.echo(f"hint: `truthgpt jobs history {job.name}` has its last runs", err=True)
        raise click.exceptions.Exit(RAN_AND_FAILED if scheduled else 1)


_PAUSE_EPILOG = """\b
Examples:
  truthgpt jobs pause models
  truthgpt jobs pause backup --json
"""


@jobs.command("pause", cls=Command, epilog=_PAUSE_EPILOG)
@click.argument("job", type=_JobName(), metavar="NAME")
@json_option
@settings_options("home")
def pause(settings: Settings, job: Job, as_json: bool) -> None:
    """Let a job not begin any more, on any replica, until it is resumed. One that runs goes on."""
    from orchestrator.jobs.ledger import Ledger
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        changed = Ledger(client).pause(job.name, time.time())
    _paused(settings, job.name, True, changed, as_json)


_RESUME_EPILOG = """\b
Examples:
  truthgpt jobs resume models
  truthgpt jobs resume backup --json
"""


@jobs.command("resume", cls=Command, epilog=_RESUME_EPILOG)
@click.argument("job", type=_JobName(), metavar="NAME")
@json_option
@settings_options("home")
def resume(settings: Settings, job: Job, as_json: bool) -> None:
    """Let a job run again. What was due while it was paused is done once, at once."""
    from orchestrator.jobs.ledger import Ledger
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        changed = Ledger(client).resume(job.name)
    _paused(settings, job.name, False, changed, as_json)


_HISTORY_EPILOG = """\b
Examples:
  truthgpt jobs history
  truthgpt jobs history backup --json
"""


@jobs.command("history", cls=Command, epilog=_HISTORY_EPILOG)
@click.argument("job", required=False, type=_JobName(), metavar="[NAME]")
@click.option(
    "-n", "--limit", type=click.IntRange(1, 1000), default=20, show_default=True, metavar="N", help="At most."
)
@json_option
@settings_options("model_repository", "home")
def history(settings: Settings, job: Job | None, limit: int, as_json: bool) -> None:
    """Show the last runs of a job, or of all, newest first: when, how long, how they ended, what they did and where."""
    from orchestrator.ops import joblist
    from orchestrator.ops.redis import connect

    with connect(settings) as client:
        runs = joblist.history(settings, client, job, limit)
    if as_json:
        print_json([_document(ended) for ended in runs])
        return
    if not runs:
        click.echo("no runs yet", err=True)
        return
    table.show(
        ("JOB", "STARTED (UTC)", "SECONDS", "RESULT", "WHAT", "WHERE"),
        [
            (ended.job, _short(ended.started), f"{ended.seconds:.1f}", ended.result,
             _printable(ended.error or ended.did), _printable(ended.holder))
            for ended in runs
        ],
        folds=("WHAT",),
    )  # fmt: skip


def _paused(settings: Settings, name: str, paused: bool, changed: bool, as_json: bool) -> None:
    verb = "pause" if paused else "resume"
    if changed:
        audited(settings, f"jobs {verb}", detail=name)
    if as_json:
        print_json({"name": name, "paused": paused, "changed": changed})
    else:
        click.echo(f"{name} {'is' if changed else 'was already'} {'paused' if paused else 'resumed'}")


def _document(ended: Run) -> dict[str, Any]:
    return {
        "name": ended.job, "started": _stamp(ended.started), "seconds": ended.seconds, "result": ended.result,
        "did": ended.did, "error": ended.error, "holder": ended.holder, "manual": ended.manual,
    }  # fmt: skip


def _stamp(at: float | None) -> str | None:
    """RFC 3339, UTC."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _short(at: float | None) -> str:
    """For people, UTC."""
    return "" if at is None else f"{datetime.fromtimestamp(at, UTC):%m-%d %H:%M}"


def _printable(text: str) -> str:
    """What a terminal may be given."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
