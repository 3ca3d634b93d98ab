"""`truthgpt backup`: a deployment in one file, checked and put back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.base import Command, Group, audited, json_option, print_json, settings_options
from orchestrator.cli.keyflags import asks, confirmed, when
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.ops.backup import Difference, Report

SHOWN = 10  # names of each kind of change
_PATH = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("backup", cls=Group)
def backup() -> None:
    """Make, list, check and put back backups: models, keys, limits, cached answers, audit log, metrics and settings.

    docs/backup.md says what is in a backup, what is consistent with what, and how a deployment is brought back.
    """


_CREATE_EPILOG = """\b
Examples:
  truthgpt backup create
  truthgpt backup create --no-models --backup-dir /mnt/backups
  truthgpt backup create --json
"""


@backup.command("create", cls=Command, epilog=_CREATE_EPILOG)
@click.option("--no-models", is_flag=True, help="Leave the model repository out.")
@click.option("--no-cache", is_flag=True, help="Leave cached answers out.")
@json_option
@settings_options("backup_dir", "home", "model_repository")
def create(settings: Settings, no_models: bool, no_cache: bool, as_json: bool) -> None:
    """Copy everything into one file, while the stack runs or not. It is encrypted if TRUTHGPT_BACKUP_KEY is set."""
    from orchestrator.ops import backup

    if settings.backup_key is None:
        click.echo("note: the backup will not be encrypted, and has the audit log's key, the hashes of API keys and, "
                   "in the clear, the secrets in truthgpt.toml; `truthgpt backup keygen` makes a key",
                   err=True)  # fmt: skip
    with _bar("backing up", as_json) as progress:
        made = backup.create(settings, models=not no_models, cache=not no_cache, progress=progress)
    _tell_recovered(made.recovered)
    audited(settings, "backup create", detail=f"{made.id}: {made.files} files")
    if as_json:
        print_json({**asdict(made), "path": str(made.path.absolute())})
        return
    click.echo(f"{made.path}: {made.files} files, {_size(made.bytes)}\nsha256 {made.sha256}")
    if made.redis == "none":
        click.echo("there are no data of Redis: no stack has ever run from this home", err=True)


_LIST_EPILOG = """\b
Examples:
  truthgpt backup list
  truthgpt backup list --backup-dir /mnt/backups --json
"""


@backup.command("list", cls=Command, epilog=_LIST_EPILOG)
@json_option
@settings_options("backup_dir", "home")
def list_(settings: Settings, as_json: bool) -> None:
    """List the backups, newest first. Whether one is good is for `truthgpt backup verify` to say."""
    from orchestrator.ops import backup

    found = backup.infos(settings.backups)
    if as_json:
        print_json([{**asdict(info), "path": str(info.path.absolute())} for info in found])
    elif not found:
        click.echo(f"there are no backups in {settings.backups}", err=True)
    for info in [] if as_json else found:
        kind = "encrypted" if info.encrypted else "not encrypted"
        click.echo(f"{when(info.created)}  {_size(info.bytes):>9}  {kind:<13}  {info.path}")


_VERIFY_EPILOG = """\b
Examples:
  truthgpt backup verify .truthgpt/backups/truthgpt-20261126T183000Z-1a2b3c4d.tar
  truthgpt backup verify /mnt/copies/truthgpt-20261126T183000Z-1a2b3c4d.tar.age --json
"""


@backup.command("verify", cls=Command, epilog=_VERIFY_EPILOG)
@click.argument("path", type=_PATH)
@json_option
@settings_options()
def verify(settings: Settings, path: Path, as_json: bool) -> None:
    """Check every byte of a backup; exit code 0 only if all of it is as it was written."""
    from orchestrator.ops import backup

    with _bar("verifying", as_json) as progress:
        report = backup.verify(path, settings.backup_key, progress)
    if as_json:
        print_json(_document(report))
    else:
        click.echo(_printable(_told(report)))


_RESTORE_EPILOG = """\b
Examples:
  truthgpt backup restore truthgpt-20261126T183000Z-1a2b3c4d.tar --dry-run
  truthgpt backup restore truthgpt-20261126T183000Z-1a2b3c4d.tar --yes
  truthgpt backup restore truthgpt-20261126T183000Z-1a2b3c4d.tar --target /srv/drill --model-repository /srv/models
"""


@backup.command("restore", cls=Command, epilog=_RESTORE_EPILOG)
@click.argument("path", type=_PATH)
@click.option("--target", type=click.Path(path_type=Path, file_okay=False), metavar="HOME", help="The home to put it "
              "into.  [default: the settings' home]")  # fmt: skip
@click.option("--redis", "given_redis", is_flag=True, help="Into another home: put keys and all that Redis knows into "
              "the Redis of TRUTHGPT_REDIS_URL.  [default: into files of that home]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would change and change nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.  [default: ask where standard input is a terminal]")
@json_option
@settings_options("model_repository")
def restore(
    settings: Settings, path: Path, target: Path | None, given_redis: bool, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Put a backup back into a home that no stack runs from, and into the model repository.

    Into another home than the settings' one nothing of the deployment that is there is touched: models are replaced in
    a folder that --model-repository names only, and the Redis of TRUTHGPT_REDIS_URL is left alone.

    All of it is checked first. What is replaced is moved aside, to HOME.before-TIME and REPOSITORY.before-TIME; logs,
    backups and whatever else is in the home stay. Where anything fails, everything is as it was.
    """
    from orchestrator.ops import backup

    named = settings.model_repository if settings.sources()["model_repository"].startswith("flag ") else None

    def agreed(report: Report, difference: Difference) -> bool:
        bar.stop()
        if not as_json:
            _show(report, difference)
        elif asks(yes):
            _show(report, difference, err=True)
        confirmed(yes, f"Replace {_listed(difference.replaces)}?")
        bar.start()
        return True

    with _Bar("restoring", as_json) as bar:
        result = backup.restore(
            settings, path, agreed, target=target, repository=named, given_redis=given_redis, dry_run=dry_run,
            progress=bar.progress,
        )  # fmt: skip
    _tell_recovered(result.recovered)
    settings = replace(settings, home=settings.home if target is None else target)
    if result.done:
        audited(settings, "backup restore", detail=result.report.manifest.id)
    if as_json:
        print_json({
            **_document(result.report), **asdict(result.difference), "restored": result.done,
            "kept": [str(folder) for folder in result.kept],
            "config": None if result.config is None else str(result.config),
        })  # fmt: skip
        return
    if not result.done:
        _show(result.report, result.difference)
        return
    click.echo(f"{result.report.manifest.id} is in {settings.home}")
    for folder in result.kept:
        click.echo(f"what was there before is in {folder}")
    if result.elsewhere and "redis" in result.report.manifest.origins and "redis" not in result.difference.replaces:
        click.echo(f"its keys are in {settings.home / 'redis'}, and used with: export TRUTHGPT_REDIS_URL=")
    if result.config is not None:
        click.echo(f"its settings are used with: export TRUTHGPT_CONFIG={result.config}")


_PRUNE_EPILOG = """\b
Examples:
  truthgpt backup prune --dry-run
  TRUTHGPT_BACKUP_KEEP=3 truthgpt backup prune
"""


@backup.command("prune", cls=Command, epilog=_PRUNE_EPILOG)
@click.option("--dry-run", is_flag=True, help="Say what would be removed.")
@json_option
@settings_options("backup_dir", "home", "backup_days", "backup_keep")
def prune(settings: Settings, dry_run: bool, as_json: bool) -> None:
    """Remove backups that are too old or too many, by backup_days and backup_keep; never the newest."""
    from orchestrator.ops import backup

    removed = backup.prune(settings, dry_run)
    if removed and not dry_run:
        audited(settings, "backup prune", detail=f"{len(removed)} files")
    if as_json:
        print_json({"removed": [str(path) for path in removed], "dry_run": dry_run})
        return
    for path in removed:
        click.echo(f"{'would remove' if dry_run else 'removed'} {path}")
    if not removed:
        click.echo("there is nothing to remove", err=True)


_KEYGEN_EPILOG = """\b
Examples:
  truthgpt backup keygen
  truthgpt backup keygen --json
"""


@backup.command("keygen", cls=Command, epilog=_KEYGEN_EPILOG)
@json_option
def keygen(as_json: bool) -> None:
    """Make a key for backups and show it, this once. Who has it can read them; without it nobody can."""
    from orchestrator.ops import backup

    key, recipient = backup.new_key()
    if as_json:
        print_json({"key": key, "recipient": recipient})
        return
    click.echo(key)
    click.echo("Keep it where the backups are not, and give it to the stack and to these commands:\n", err=True)
    click.echo("  export TRUTHGPT_BACKUP_KEY=AGE-SECRET-KEY-…", err=True)


class _Bar:
    """Progress in bytes on a terminal's standard error; nothing elsewhere."""

    def __init__(self, what: str, quiet: bool) -> None:
        self._what, self._bar = what, None  # type: str, Any
        self._shown = sys.stderr.isatty() and not quiet
        self._task: Any = None

    def __enter__(self) -> _Bar:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._what, total=None)
            self._bar.start()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def progress(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)


@contextlib.contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    with _Bar(what, quiet) as bar:
        yield bar.progress


def _tell_recovered(aside: Sequence[Path | str] | None) -> None:
    if aside is None:
        return
    click.echo("a restore that was interrupted was undone first", err=True)
    for path in aside:
        click.echo(f"what had been made since in place of something that it had moved is in {path}", err=True)


def _document(report: Report) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "ok": True, "id": manifest.id, "path": str(report.path), "bytes": report.bytes, "files": manifest.files,
        "created": manifest.created, "version": manifest.version, "encrypted": report.encrypted,
        "origins": manifest.origins,
    }  # fmt: skip


def _told(report: Report) -> str:
    manifest = report.manifest
    kind = "encrypted" if report.encrypted else "not encrypted"
    trees = ", ".join(manifest.origins)
    return (f"ok: {manifest.id} of {when(manifest.created)}, {manifest.files} files, {_size(report.bytes)}, {kind}, "
            f"has {trees}")  # fmt: skip


def _listed(replaces: dict[str, str]) -> str:
    """Everything that gets other contents, in words."""
    names = {"home": "the home", "models": "the model repository", "redis": "what is in the Redis"}
    return " and ".join(f"{names[what]} {_printable(where)}" for what, where in replaces.items())


def _show(report: Report, difference: Difference, err: bool = False) -> None:
    def echo(text: str) -> None:
        click.echo(_printable(text), err=err)

    echo(_told(report))
    echo(f"replaces  {_listed(difference.replaces)}")
    for tree, rows in difference.trees.items():
        echo(f"{tree:<9} {len(rows.added)} added, {len(rows.changed)} changed, {len(rows.removed)} removed, "
             f"{rows.same} the same")  # fmt: skip
        for mark, names in (("+", rows.added), ("~", rows.changed), ("-", rows.removed)):
            for name in names[:SHOWN]:
                echo(f"  {mark} {name}")
            if len(names) > SHOWN:
                echo(f"  {mark} and {len(names) - SHOWN} more")
    if "redis" in report.manifest.origins:
        was, now = difference.redis_backup, difference.redis_now
        known = f"{now['keys']} keys, {now['limits']} limits" if now is not None else difference.redis_unknown or "none"
        echo(f"{'redis':<9} {was.get('keys')} keys, {was.get('limits')} limits, {was.get('entries')} entries; "
             f"now {known}")  # fmt: skip
    for name, before, after in difference.settings:
        echo(f"{'setting':<9} {name} was {before or '(unset)'}, is {after or '(unset)'}")


def _printable(text: str) -> str:
    """What a terminal may be given."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _size(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, _ = value / 1000, units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"
