"""Putting a backup back: checked completely, then taken out beside what is there, then exchanged for it in one go.

What is replaced is what a backup has: in the home the audit log and its key, the metric history, the lists of loaded
models and of alerts, the embedded Redis's files, and truthgpt.toml if the backup has one; all of the model repository,
if the backup has one. placing.py says whose. It is moved to HOME.before-TIME and REPOSITORY.before-TIME. Everything
else in the home stays where it is: logs, backups, whatever lies there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from orchestrator.local import swap
from orchestrator.ops.backup import collecting, difference, extracting, names, reading, redisdata, redissource
from orchestrator.ops.backup.difference import Difference
from orchestrator.ops.backup.errors import BackupError, Damaged
from orchestrator.ops.backup.placing import Target
from orchestrator.ops.backup.reading import Report
from orchestrator.ops.backup.tarform import BLOCK, Manifest, Member
from orchestrator.settings import Settings

if TYPE_CHECKING:
    import redis

SETTINGS_BYTES = 1 << 20
SLACK_BYTES = 8 << 20
Progress = Callable[[int, int], None]  # bytes done, and of how many


@dataclass
class Restored:
    """`done` is false after a dry run or a no. `kept`: where what was there before is. `config`: the settings file.

    `recovered`: None, unless a restore that was interrupted was undone: then where is what stood in the way of that.
    `elsewhere`: whether this is another home than the settings' one.
    """

    report: Report
    difference: Difference
    done: bool = False
    recovered: list[Path] | None = None
    kept: list[Path] = field(default_factory=list)
    config: Path | None = None
    elsewhere: bool = False


def verify(path: Path, key: str | None, progress: Progress = lambda done, total: None) -> Report:
    """Check every byte of a backup. Raises BackupError, Damaged where it is not right, and OSError."""
    with reading.opened(path) as file:
        return reading.read(path, file, key, reading.Nowhere(), progress)


def restore(
    settings: Settings, path: Path, agreed: Callable[[Report, Difference], bool], *, target: Path | None = None,
    repository: Path | None = None, given_redis: bool = False, dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> Restored:  # fmt: skip
    """Put a backup back into `settings.home` and `settings.model_repository`, once `agreed` says yes to what changes.

    Or into the home `target`, with its models in `repository`, and `given_redis` says whether the Redis that the
    settings give is its: see placing.py. Nothing is touched before every byte was checked, and everything is as it
    was where any step fails. Raises BackupError, NoRedis, swap.NoteError and OSError.
    """
    aim = Target(settings, target, repository, given_redis)
    settings = aim.settings
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(reading.opened(path))
        kept = _Settings()
        report = reading.read(path, file, settings.backup_key, kept, progress)
        aim.check(report.manifest)
        held = not dry_run and settings.home.is_dir()
        recovered = stack.enter_context(redissource.held(settings.home)) if held else None
        found = _difference(aim, report.manifest, kept, held, progress)
        aim.settle(found, dry_run)
        if not dry_run:
            aim.check_unserved(report.manifest)
        result = Restored(report, found, recovered=recovered, elsewhere=aim.elsewhere)
        if dry_run or not agreed(report, found):
            return result
        if not held:
            stack.enter_context(_new_home(settings.home))
        stack.enter_context(_told())
        _put_back(aim, path, file, result, progress)
    return result


@contextlib.contextmanager
def _new_home(home: Path) -> Iterator[None]:
    """Make a home and hold it; it goes again where nothing is put into it."""
    with extracting.made(home, 0o700) as path, redissource.held(home):
        try:
            yield
        finally:
            if os.listdir(path) == ["lock"]:
                (path / "lock").unlink()


class _Settings(reading.Nowhere):
    """Remembers what the settings were."""

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}

    def file(self, member: Member, chunks: Iterator[bytes]) -> None:
        if member.name == f"settings/{collecting.SETTINGS}" and member.bytes <= SETTINGS_BYTES:
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(b"".join(chunks))
                self.described = found if isinstance(found, dict) else {}


def _difference(aim: Target, manifest: Manifest, kept: _Settings, held: bool, progress: Progress) -> Difference:
    from orchestrator.ops.redis import NoRedis

    settings = aim.settings
    now, unknown = None, ""
    if "redis" in manifest.origins:
        try:
            now = _counts(settings, held)
        except (BackupError, OSError) as error:  # what is to be replaced may be what is broken
            unknown = str(error)
        except NoRedis as error:
            if settings.redis_url is not None:
                raise  # what cannot be asked cannot be written to
            unknown = str(error)
    return Difference(
        aim.replaces(manifest), difference.trees(manifest, settings, progress), manifest.redis, now, unknown,
        difference.settings_of(kept.described, settings),
    )  # fmt: skip


def _counts(settings: Settings, held: bool) -> dict[str, int] | None:
    if held and redissource.kind(settings) == redissource.STOPPED:
        with redissource.started(settings, settings.home) as client:
            return redisdata.counts(client)
    with redissource.client(settings) as found:
        return None if found is None else redisdata.counts(found)


def _put_back(aim: Target, path: Path, file: BinaryIO, result: Restored, progress: Progress) -> None:
    manifest, settings, home = result.report.manifest, aim.settings, aim.settings.home.resolve()
    with contextlib.ExitStack() as stack:
        repository = None
        if "models" in manifest.origins and aim.models:
            repository = stack.enter_context(extracting.made(settings.model_repository))
        # beside a home that lies in the repository it would be taken for a model
        among_models = home.is_relative_to(settings.model_repository.resolve())
        places = [extracting.Beside(home, among_models), *([extracting.Beside(repository)] if repository else [])]
        for place in places:
            place.remove_empty()
        at = time.time()
        while any(_before(place, at).exists() for place in places):
            at += 1.0
        staged = stack.enter_context(extracting.staging(places[0]))
        roots = {"home": staged / "home", "settings": staged / "settings", "redis": staged / "redis"}
        folders = {staged: _before(places[0], at)}
        if repository is not None:
            staged_models = stack.enter_context(extracting.staging(places[1]))
            folders[staged_models] = _before(places[1], at)
            roots["models"] = staged_models / "models"
        _require_space(manifest, roots)
        sink = extracting.Extract(roots)
        again = reading.read(path, file, settings.backup_key, sink, progress)
        if again.sha256 != result.report.sha256:
            raise Damaged(f"{path} was changed while it was being put back")
        sink.finish()
        for folder in folders.values():
            stack.enter_context(_kept(folder))
        before = folders[staged]
        with _redis(settings, manifest, staged, before) as embedded:
            moves = _moves(home, staged, before, embedded, "home" in manifest.origins)
            if repository is not None:
                moves += _model_moves(settings, repository, roots["models"], folders[staged_models])
            aim.check_unserved(manifest)  # taking it out may have lasted
            _exchange(home, moves, list(folders), list(folders.values()))
        result.done = True
        result.kept = [folder for folder in folders.values() if any(folder.iterdir())]
        config = home / collecting.CONFIG
        result.config = config if any(target == config for _, target in moves) else None


def _exchange(home: Path, moves: list[swap.Move], staging: list[Path], kept: list[Path]) -> None:
    try:
        swap.exchange(home, moves, staging, kept)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        hint = "unmount it while the backup is put back, or restore into a folder in which nothing is mounted"
        why = "something is mounted there, or it is part of a container's image"
        told = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        raise BackupError(f"{error.filename} cannot be moved: {why}; everything is as it was{told}", hint) from error


def _before(place: extracting.Beside, at: float) -> Path:
    return place.path(extracting.BEFORE, names.stamp(at))


def _moves(home: Path, staged: Path, before: Path, embedded: Path | None, has_home: bool) -> list[swap.Move]:
    sources: dict[str, Path] = {}
    if has_home:
        sources = {name: staged / "home" / name for name in (*collecting.SINGLE, "audit", collecting.METRICS)}
    if (staged / "settings" / collecting.CONFIG).exists():
        sources[collecting.CONFIG] = staged / "settings" / collecting.CONFIG
    if embedded is not None:
        sources["redis"] = embedded
    moves = []
    for name, source in sources.items():
        if os.path.lexists(home / name):
            moves.append((home / name, before / name))
        if source.exists():
            moves.append((source, home / name))
    return moves


def _model_moves(settings: Settings, repository: Path, staged: Path, before: Path) -> list[swap.Move]:
    old = [(repository / path.name, before / path.name) for path in difference.models_now(settings)]
    return old + [(staged / name, repository / name) for name in sorted(os.listdir(staged))]


@contextlib.contextmanager
def _redis(settings: Settings, manifest: Manifest, staged: Path, before: Path) -> Iterator[Path | None]:
    """Load what Redis knew: into the given one, which gets back what it had if what follows fails, else into files.

    The files' folder, None where the given one was used.
    """
    if "redis" not in manifest.origins:
        yield None
        return
    with (staged / "redis" / "keys.jsonl").open("rb") as lines:
        if settings.redis_url is None:
            home = staged / "embedded"
            home.mkdir(mode=0o700)
            with redissource.started(settings, home) as client:
                redisdata.load(client, lines)
            swap.sync_folder(home / "redis")
            yield home / "redis"
            return
        from orchestrator.ops.redis import connect

        saved = before / "keys.jsonl"
        with connect(settings) as client:
            with open(os.open(saved, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w+b") as old:
                redisdata.save(client, lines, old)
                old.flush()
                os.fsync(old.fileno())
                try:
                    lines.seek(0)
                    redisdata.load(client, lines)
                    yield None
                except BaseException:
                    _give_back(client, old, saved)
                    raise


def _give_back(client: redis.Redis, old: BinaryIO, saved: Path) -> None:
    old.seek(0)
    try:
        redisdata.load(client, old)
    except Exception as error:
        hint = f"what it had is in {saved}; put the backup back again once Redis answers"
        raise BackupError(f"Redis could not be given back what it had: {error}", hint) from error
    saved.unlink()


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """A folder for what was there before; removed again where nothing is in it."""
    folder.mkdir(mode=0o700)
    swap.sync_folder(folder.parent)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _require_space(manifest: Manifest, roots: dict[str, Path]) -> None:
    """Refuse before anything is written. Redis's files are about as large as what they are made of."""
    needed: dict[int, int] = {}
    for member in manifest.members:
        tree = member.name.partition("/")[0]
        if tree not in roots:
            continue
        device = roots[tree].parent.stat().st_dev
        needed[device] = needed.get(device, 0) + (member.bytes + BLOCK) * (2 if tree == "redis" else 1)
    for folder in {root.parent for root in roots.values()}:
        free, wanted = shutil.disk_usage(folder).free, needed.get(folder.stat().st_dev, 0) + SLACK_BYTES
        if free < wanted:
            raise BackupError(
                f"the backup needs about {wanted:,} bytes beside {folder.parent}, but only {free:,} are free",
                "free some space; what is there now stays beside what is put back",
            )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A full disk, in words."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise BackupError(
            f"no room is left to put the backup back: {error.strerror}; everything is as it was", "free some space"
        ) from error
