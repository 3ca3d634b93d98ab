"""Making a backup: everything is copied into one file, which appears once it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from orchestrator.local import swap
from orchestrator.ops.backup import collecting, names, placing, redisdata, redissource, sealing
from orchestrator.ops.backup.errors import BackupError, Changed
from orchestrator.ops.backup.tarform import BLOCK, Manifest
from orchestrator.ops.backup.writing import Output, Writer
from orchestrator.settings import Settings

TRIES = 3  # models come and go; a backup in which one did is begun anew
SLACK_BYTES = 8 << 20  # for the manifest, headers and what grows meanwhile
Progress = Callable[[int, int], None]  # bytes done, and of how many


@dataclass(frozen=True)
class Created:
    """A new backup. `bytes` and `sha256` are the file's, `files` what is in it, `redis` where that part is from.

    `recovered`: None, unless a restore that was interrupted was undone first: then where what stood in its way is now.
    """

    id: str
    path: Path
    bytes: int
    files: int
    sha256: str
    encrypted: bool
    redis: str
    recovered: list[str] | None = None


def create(
    settings: Settings, *, models: bool = True, cache: bool = True, progress: Progress = lambda done, total: None
) -> Created:
    """Back up a deployment into `settings.backups`, encrypted where there is a `backup_key`.

    `models` and `cache`: whether the model repository and cached answers are in it. Nothing is left where it fails.
    Raises BackupError, NoRedis, swap.NoteError and OSError.
    """
    _require(settings, models)
    names.remove_abandoned(settings.backups, time.time())
    recovered = None
    if os.path.lexists(settings.home / swap.NOTE):
        with redissource.held(settings.home) as aside:  # undoes what a restore that was killed has left half done
            recovered = None if aside is None else [str(path) for path in aside]
    with _told(settings.backups), tempfile.TemporaryFile(dir=settings.home) as spool:
        began = time.time()
        redis = _export(settings, spool, cache)
        for left in reversed(range(TRIES)):
            try:
                return replace(_attempt(settings, models, spool, redis, began, progress), recovered=recovered)
            except Changed:
                if not left:
                    raise
    raise AssertionError("unreachable")


def _require(settings: Settings, models: bool) -> None:
    """A name that was mistyped is not a deployment that has nothing. Raises BackupError."""
    if not settings.home.is_dir():
        raise BackupError(f"there is no home {settings.home}", "--home or TRUTHGPT_HOME names it")
    if models and not settings.model_repository.is_dir():
        hint = "--model-repository names it, --no-models makes a backup without it"
        raise BackupError(f"there is no model repository {settings.model_repository}", hint)
    if models:
        placing.check_layout(settings)


def _export(settings: Settings, spool: BinaryIO, cache: bool) -> dict[str, object]:
    source = redissource.kind(settings)
    with redissource.client(settings) as client:
        if client is None:
            return {"source": source}
        return {"source": source, **redisdata.export(client, spool, cache)}


def _attempt(
    settings: Settings, models: bool, spool: BinaryIO, redis: dict[str, object], began: float, progress: Progress
) -> Created:
    found = collecting.models(settings) if models else []
    spooled = spool.seek(0, 2)
    spool.seek(0)
    total = sum(item.bytes for item in found) + collecting.home_bytes(settings.home) + spooled
    manifest = Manifest(names.new_id(began), began, metadata.version("truthgpt"), redis=redis)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, max(done, total))

    encrypted = settings.backup_key is not None
    with names.part(settings.backups, manifest.id, encrypted) as (handle, path):
        _require_space(settings.backups, total + len(found) * 2 * BLOCK + SLACK_BYTES)
        output = Output(handle)
        with contextlib.ExitStack() as stack:
            write: Callable[[bytes], None] = output.write
            if settings.backup_key is not None:
                write = stack.enter_context(sealing.encrypted(write, settings.backup_key))
            writer = Writer(write, manifest, advance)
            _write(writer, settings, spool if redis["source"] != redissource.NONE else None, spooled, found)
            writer.finish()
        published = names.publish(handle, path).absolute()
    return Created(
        manifest.id, published, output.bytes, manifest.files, output.hash.hexdigest(), encrypted, str(redis["source"])
    )


def _write(
    writer: Writer, settings: Settings, spool: BinaryIO | None, spooled: int, found: list[collecting.Found]
) -> None:
    origins = writer.manifest.origins
    origins["settings"] = _shown(settings.config_file)
    collecting.write_settings(writer, settings)
    if spool is not None:
        origins["redis"] = ascii(settings.shown("redis_url"))[1:-1] or _shown(settings.home / "redis")
        writer.folder("redis", 0o700, 0)
        writer.file("redis/keys.jsonl", spooled, 0o600, 0, spool)
    origins["home"] = _shown(settings.home)
    collecting.write_home(writer, settings.home)
    if found:
        origins["models"] = _shown(settings.model_repository)
        collecting.write_models(writer, found)


def _shown(path: Path | None) -> str:
    return "" if path is None else ascii(str(path.absolute()))[1:-1]


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BackupError(
            f"the backup needs up to {needed:,} bytes in {folder}, but only {free:,} are free",
            "free some space, set TRUTHGPT_BACKUP_DIR to another disk, or leave the models out with --no-models",
        )


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """A full disk, in words."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise BackupError(
            f"no room is left in {folder}, or in the home for what Redis has: {error.strerror}; nothing was kept",
            "free some space, set TRUTHGPT_BACKUP_DIR to another disk, or leave the models out with --no-models",
        ) from error
