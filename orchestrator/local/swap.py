"""Exchanging files and folders for others, all or none, also under `kill -9`.

What is to be renamed is written down first (home/restore.json). Whoever finds that note holds the home and undoes what
was done of it. Once everything is in its place the note says so, in one step, and is removed: from that step on nothing
is undone. A rename that was done is known by the inode at its target, which was noted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOTE = "restore.json"
Move = tuple[Path, Path]  # from, to


class NoteError(Exception):
    """What an interrupted restore was about to do cannot be read; `hint` says what to do."""

    def __init__(self, note: Path) -> None:
        super().__init__(f"{note}, which says how far an interrupted restore had come, cannot be read")
        self.hint = (
            "see what is in the folders `….before-TIME` and `….restoring-…` beside the home and the model repository, "
            "put back what is missing and remove that file"
        )


def exchange(home: Path, moves: Sequence[Move], staging: Sequence[Path], kept: Sequence[Path]) -> None:
    """Do all renames, in order, or none. Whoever calls holds the home.

    `staging`: folders that are removed where it is undone after a crash; `kept`: those that are removed then if they
    are empty. Raises OSError, with everything as it was, unless undoing failed, too: `recover` goes on with that.
    """
    note = home / NOTE
    inodes = [os.lstat(source).st_ino for source, _ in moves]
    document = {
        "moves": [[str(source), str(target)] for source, target in moves], "inodes": inodes,
        "staging": [str(folder) for folder in staging], "kept": [str(folder) for folder in kept],
    }  # fmt: skip
    _write(note, document)
    try:
        for source, target in moves:
            os.rename(source, target)
        _sync(moves)
        _write(note, {**document, "done": True})
    except BaseException as error:
        for path in _undo(moves, inodes):
            error.add_note(f"{path} was in the way of what was put back")
        note.unlink()
        raise
    with contextlib.suppress(OSError):  # it is done; the note says that, too
        note.unlink()
        sync_folder(home)


def pending(home: Path) -> bool:
    """Whether a restore was interrupted in this home that nobody has undone yet. Raises OSError."""
    try:
        return not _read(home / NOTE)["done"]
    except FileNotFoundError:
        return False
    except NoteError:
        return True


def recover(home: Path) -> list[Path] | None:
    """Undo what a process that was killed has left half done; None where there was nothing to undo.

    What stood where something had to go back to is moved aside, to the paths that are returned. Whoever calls holds
    the home. Raises OSError, and NoteError.
    """
    note = home / NOTE
    try:
        found = _read(note)
    except FileNotFoundError:
        return None
    aside = None
    if not found["done"]:
        aside = _undo([(Path(source), Path(target)) for source, target in found["moves"]], found["inodes"])
    for folder in found["staging"]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in found["kept"]:
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(folder)
    with contextlib.suppress(OSError) if found["done"] else contextlib.nullcontext():
        note.unlink()
        sync_folder(home)
    return aside


def sync_folder(folder: Path) -> None:
    """Have what was renamed in a folder survive a power failure. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot say
            raise
    finally:
        os.close(handle)


def _undo(moves: Sequence[Move], inodes: Sequence[int]) -> list[Path]:
    """Where what was in the way is now."""
    aside = []
    for (source, target), inode in reversed([*zip(moves, inodes, strict=True)]):
        if not os.path.lexists(target) or os.lstat(target).st_ino != inode:
            continue
        if os.path.lexists(source):  # somebody has made another one meanwhile
            aside.append(source.with_name(f".{source.name}.aside-{secrets.token_hex(4)}"))
            os.rename(source, aside[-1])
        source.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # somebody may have cleared staging away
        os.rename(target, source)
    _sync(moves)
    return aside


def _sync(moves: Sequence[Move]) -> None:
    for folder in {path.parent for move in moves for path in move}:
        with contextlib.suppress(FileNotFoundError):  # and so nothing was renamed in it
            sync_folder(folder)


def _read(note: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, other OSErrors, and NoteError."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        moves, inodes = found["moves"], found["inodes"]
        texts = [*(path for source, target in moves for path in (source, target)), *found["staging"], *found["kept"]]
        if len(moves) != len(inodes) or not all(isinstance(text, str) for text in texts):
            raise ValueError
        return {**found, "done": found.get("done") is True}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NoteError(note) from error


def _write(path: Path, document: object) -> None:
    """On the disk in one step."""
    fresh = path.with_suffix(".new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync_folder(path.parent)
