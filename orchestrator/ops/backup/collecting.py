"""What of a deployment is in a backup, and how it is copied while it is being written to.

    settings/   the settings file as it is; settings.json: every setting, its value (secrets masked) and source
    redis/      keys.jsonl, see redisdata.py
    home/       audit/, audit.key, metrics/, models.json, alerts.json
    models/     the model repository without what is hidden in it

A file that grows is copied as long as it was when it was opened. So that the copy's chain holds, the audit log's `head`
is read before its lines, its `base`, the mark of what retention has removed, once all files are open, and its newest
file ends with its last whole line. Files of the model repository do not change once they are published: one that did,
or is gone, is noticed and nothing is published.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from orchestrator.auditlog import BASE, CURRENT, HEAD, end_of_lines, folder_of
from orchestrator.fingerprint import KEY_FILE
from orchestrator.ops import auditing
from orchestrator.ops.backup.errors import BackupError, Changed
from orchestrator.ops.backup.tarform import MOST_MEMBERS
from orchestrator.ops.backup.writing import Writer, too_many
from orchestrator.settings import Settings

CONFIG = "truthgpt.toml"
SETTINGS = "settings.json"
SINGLE = (KEY_FILE, "models.json", "alerts.json")
METRICS = "metrics"
_LOOKS = 5  # at a log that is moved aside again and again


@dataclass(frozen=True)
class Found:
    """A folder or file of a tree: its place there, where it is, and what identifies its content."""

    name: str
    path: Path
    folder: bool
    bytes: int
    mode: int
    mtime: int
    mark: tuple[int, ...]


def walk(root: Path, name: str, without: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Found]:
    """A folder and all that is in it, sorted, links followed; `without` are folders (device, inode) that are left out.

    At its top what begins with a dot is left out. Raises BackupError for what is neither folder nor file, Changed for
    what goes meanwhile, OSError.
    """
    yield from _walk(root, name, without, ())


def _walk(
    path: Path, name: str, without: frozenset[tuple[int, int]], above: tuple[tuple[int, int], ...]
) -> Iterator[Found]:
    try:
        facts = path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise BackupError(f"{path} leads nowhere", "remove it, or put back what it leads to") from error
        raise Changed(str(path)) from error
    me = (facts.st_dev, facts.st_ino)
    if me in without:
        return
    mode, mtime = stat.S_IMODE(facts.st_mode) & 0o777, min(max(0, int(facts.st_mtime)), (1 << 33) - 1)
    if stat.S_ISDIR(facts.st_mode):
        if me in above:
            raise BackupError(f"{path} is a link to a folder that it is in", "remove it")
        yield Found(name, path, True, 0, mode, mtime, (*me, 0, 0))
        try:
            names = sorted(os.listdir(path))
        except FileNotFoundError as error:
            raise Changed(str(path)) from error
        for entry in names:
            if above or not entry.startswith("."):
                yield from _walk(path / entry, f"{name}/{entry}", without, (*above, me))
    elif stat.S_ISREG(facts.st_mode):
        yield Found(name, path, False, facts.st_size, mode, mtime, (*me, facts.st_size, facts.st_mtime_ns))
    else:
        raise BackupError(f"{path} is neither a file nor a folder", "remove it")


def models(settings: Settings) -> list[Found]:
    """The model repository as it is now; empty where there is none. Home and backups in it are left out."""
    root = settings.model_repository
    if not root.is_dir():
        return []
    without = set()
    for folder in (settings.home, settings.backups):
        if folder.is_dir():
            facts = folder.stat()
            without.add((facts.st_dev, facts.st_ino))
    found: list[Found] = []
    for item in walk(root, "models", frozenset(without)):
        if len(found) >= MOST_MEMBERS:
            raise too_many()
        found.append(item)
    return found


def write_models(writer: Writer, found: list[Found]) -> None:
    """Copy what `models` has found. Raises Changed where that is not what is there any more."""
    for item in found:
        if item.folder:
            writer.folder(item.name, item.mode, item.mtime)
            continue
        with _opened(item.path) as file:
            if _mark(file) != item.mark:
                raise Changed(str(item.path))
            writer.file(item.name, item.bytes, item.mode, item.mtime, file)
    for item in found:  # a model's config.pbtxt belongs to its versions
        if not item.folder:
            try:
                facts = item.path.stat()
            except FileNotFoundError as error:
                raise Changed(str(item.path)) from error
            if (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns) != item.mark:
                raise Changed(str(item.path))


def home_bytes(home: Path) -> int:
    """About how many bytes `write_home` will copy."""
    total = 0
    for folder in (folder_of(home), home / METRICS):
        for path in folder.rglob("*") if folder.is_dir() else ():
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def write_home(writer: Writer, home: Path) -> None:
    """Copy what matters of a home. Raises Changed, BackupError and OSError."""
    writer.folder("home", 0o700, 0)
    _write_audit(writer, folder_of(home))
    for name in SINGLE:
        if (home / name).exists():
            with _opened(home / name) as file:
                _write(writer, f"home/{name}", file)
    if (home / METRICS).is_dir():
        _write_metrics(writer, home / METRICS)


def write_settings(writer: Writer, settings: Settings) -> None:
    """The settings file and what all settings are. Raises OSError."""
    writer.folder("settings", 0o700, 0)
    if settings.config_file is not None:
        with settings.config_file.open("rb") as file:
            _write(writer, f"settings/{CONFIG}", file)
    data = json.dumps(described(settings), indent=1).encode()
    writer.file(f"settings/{SETTINGS}", len(data), 0o600, 0, io.BytesIO(data))


def described(settings: Settings) -> dict[str, dict[str, str]]:
    """Each setting's value as it may be shown, and where it came from."""
    sources = settings.sources()
    return {name: {"value": settings.shown(name), "source": source} for name, source in sources.items()}


def _write_audit(writer: Writer, folder: Path) -> None:
    if not folder.is_dir():
        return
    for _ in range(_LOOKS):
        head = _bytes(folder / HEAD)
        try:
            files = auditing.opened(folder)
        except auditing.NoAuditLog:
            files = []
        except FileNotFoundError:  # an old one was removed just now
            continue
        try:
            # Moved aside while its neighbours were opened, it would stand behind those that followed it.
            if files and files[-1][0].name == CURRENT and not _still(files[-1][1], files[-1][0]):
                continue
            writer.folder("home/audit", 0o700, 0)
            # `base` now: what retention has removed meanwhile is still open, and `base` is behind it
            for name, data in ((HEAD, head), (BASE, _bytes(folder / BASE))):
                if data is not None:
                    writer.file(f"home/audit/{name}", len(data), 0o600, 0, io.BytesIO(data))
            for path, file, size in files:
                if path.name == CURRENT:
                    size = end_of_lines(file.fileno())
                writer.file(f"home/audit/{path.name}", size, 0o600, _mtime(file), file)
            return
        finally:
            for _, file, _ in files:
                file.close()
    raise Changed(str(folder))


def _write_metrics(writer: Writer, folder: Path) -> None:
    """What is removed meanwhile, because it is old, is left out."""
    writer.folder("home/metrics", 0o700, 0)
    for path in sorted(folder.rglob("*")):
        name = f"home/metrics/{path.relative_to(folder)}"
        if path.is_dir():
            writer.folder(name, 0o700, 0)
        elif path.is_file():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                _write(writer, name, file)


def _write(writer: Writer, name: str, file: BinaryIO) -> None:
    facts = os.fstat(file.fileno())
    writer.file(name, facts.st_size, 0o600, _mtime(file), file)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _opened(path: Path) -> BinaryIO:
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", 0)
    except FileNotFoundError as error:
        raise Changed(str(path)) from error


def _mark(file: BinaryIO) -> tuple[int, ...]:
    facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _mtime(file: BinaryIO) -> int:
    return min(max(0, int(os.fstat(file.fileno()).st_mtime)), (1 << 33) - 1)


def _still(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
