"""What putting a backup back would change, compared with what is there now."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.ops.backup import collecting
from orchestrator.ops.backup.tarform import Manifest
from orchestrator.settings import Settings

CHUNK = 1 << 20
Progress = Callable[[int, int], None]  # bytes done, and of how many
_ELSEWHERE = {"home", "model_repository", "backup_dir"}  # where it is put back is said by who does it


@dataclass
class Tree:
    """Names of files, and how many are the same. What is `removed` is moved aside."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    same: int = 0


@dataclass
class Difference:
    """`redis_now` has keys and limits as they are, None where nobody can tell, for which `redis_unknown` has the
    reason. `settings`: name, value in the backup and value now, of those that differ. `replaces`: where the home, the
    models and a given Redis are that get other contents.
    """

    replaces: dict[str, str]
    trees: dict[str, Tree]
    redis_backup: dict[str, Any]
    redis_now: dict[str, int] | None
    redis_unknown: str
    settings: list[tuple[str, str, str]]


def trees(manifest: Manifest, settings: Settings, progress: Progress) -> dict[str, Tree]:
    """Home, models and the settings file, each if the backup has it. Raises OSError."""
    roots = {"home": settings.home, "models": settings.model_repository, "settings": settings.home}
    now = {
        "home": lambda: _governed(settings.home), "models": lambda: _models(settings),
        "settings": lambda: _files(settings.home / collecting.CONFIG, collecting.CONFIG),
    }  # fmt: skip
    total = sum(member.bytes for member in manifest.members)
    done, found = 0, {}
    for tree, root in roots.items():
        if tree not in manifest.origins:
            continue
        kept, result = {}, Tree()
        for member in manifest.members:
            first, _, name = member.name.partition("/")
            if first == tree and not member.folder and name != collecting.SETTINGS:
                kept[name] = member
        there = set(now[tree]()) if tree != "settings" or kept else set()
        for name, member in kept.items():
            if name not in there:
                result.added.append(name)
            elif _differs(root / name, member.bytes, member.sha256):
                result.changed.append(name)
            else:
                result.same += 1
            done += member.bytes
            progress(done, total)
        result.removed = sorted(there - kept.keys())
        found[tree] = result
    return found


def settings_of(described: dict[str, Any], settings: Settings) -> list[tuple[str, str, str]]:
    """The settings that are not now what they were; of secrets only whether they are set can be told."""
    now = collecting.described(settings)
    rows = []
    for name, was in described.items():
        before = was.get("value") if isinstance(was, dict) else None
        if name in now and name not in _ELSEWHERE and isinstance(before, str) and before != now[name]["value"]:
            rows.append((name, before, now[name]["value"]))
    return rows


def _governed(home: Path) -> Iterator[str]:
    for name in (*collecting.SINGLE, "audit", collecting.METRICS):
        yield from _files(home / name, name)


def _models(settings: Settings) -> Iterator[str]:
    for path in models_now(settings):
        yield from _files(path, path.name)


def models_now(settings: Settings) -> list[Path]:
    """What of the model repository a restore replaces: all but what is hidden, and home and backups where they are in
    it. Raises OSError.
    """
    root = settings.model_repository
    if not root.is_dir():
        return []
    others = {os.path.realpath(path) for path in (settings.home, settings.backups)}
    return [
        root / name for name in sorted(os.listdir(root))
        if not name.startswith(".") and os.path.realpath(root / name) not in others
    ]  # fmt: skip


def _files(path: Path, name: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of the files at or below a path, links followed but not into a folder above; what is no folder is one."""
    real = os.path.realpath(path)
    if path.is_dir() and real not in above:
        for entry in sorted(os.listdir(path)):
            yield from _files(path / entry, f"{name}/{entry}", (*above, real))
    elif os.path.lexists(path):
        yield name


def _differs(path: Path, size: int, sha256: str | None) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return True
    hash = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hash.update(chunk)
    return hash.hexdigest() != sha256
