"""The former files of config.pbtxt, the last one on top: home/tune/undo/<model>/<number>.json."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.local.swap import sync_folder
from orchestrator.ops.tune.errors import TuneError

FORMAT = 1
KEPT = 20  # of each model
_NAME = re.compile(r"([0-9]{6})\.json")


@dataclass(frozen=True)
class Former:
    """A file as it was before `after_sha256` took its place, at a Unix time in seconds; `record` says so."""

    path: Path
    before: str
    after_sha256: str
    time: float
    record: Path


def document(path: Path, before: str, after: str, time: float) -> dict[str, Any]:
    """What is kept of a change."""
    return {"format": FORMAT, "path": str(path), "before": before, "after_sha256": digest(after), "time": time}


def push(home: Path, model: str, kept: Mapping[str, Any]) -> None:
    """Put one on top; the oldest go when there are more than KEPT. Raises OSError."""
    folder = _folder(home, model)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = _records(folder)
    number = 1 + int(found[-1].stem) if found else 1
    write(folder / f"{number:06}.json", json.dumps(kept))
    for path in found[: max(0, len(found) + 1 - KEPT)]:
        path.unlink(missing_ok=True)


def top(home: Path, model: str, path: Path) -> Former:
    """The last change of this config.pbtxt. Raises TuneError when there is none, or it cannot be read."""
    for record in reversed(_records(_folder(home, model))):
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise TuneError(
                    f"{record} has format {found['format']!r}, this version of truthgpt reads {FORMAT}",
                    f"its `before` is the former {path}",
                )
            former = Former(
                Path(found["path"]), str(found["before"]), str(found["after_sha256"]), float(found["time"]), record
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TuneError(f"{record} cannot be read: {error}", "remove it to undo the change before it") from error
        if former.path == path:
            return former
    raise TuneError(f"there is nothing to undo for {model}", f"no tuning from {home} has changed {path}")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, text: str, like: Path | None = None, prefix: str | None = None) -> None:
    """As `write_bytes`, of text."""
    write_bytes(path, text.encode(), like, prefix)


def write_bytes(
    path: Path, data: bytes, like: Path | None = None, prefix: str | None = None, mode: int = 0o600
) -> None:
    """A whole file in one step, on the disk when this returns, with the mode and owner of `like`. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix or f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            facts = None if like is None else like.stat()
            os.fchmod(file.fileno(), mode if facts is None else facts.st_mode & 0o7777)
            if facts is not None:
                if (facts.st_uid, facts.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), facts.st_uid, facts.st_gid)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _folder(home: Path, model: str) -> Path:
    return home / "tune" / "undo" / model


def _records(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if _NAME.fullmatch(path.name))
