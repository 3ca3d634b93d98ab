"""Exchanging files and folders for others, all or none, also under `kill -9`.

What is to be renamed is written down first (home/restore.json). Whoever finds that note holds the home and undoes what
was done of it; it is removed once everything is in its place. A rename that was done is known by the inode at its
target, which was noted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

NOTE = "restore.json"
Move = tuple[Path, Path]  # from, to


def exchange(home: Path, moves: Sequence[Move], staging: Sequence[Path], kept: Sequence[Path]) -> None:
    """Do all renames, in order, or none. Whoever calls holds the home.

    `staging`: folders that are removed where it is undone after a crash; `kept`: those that are removed then if they
    are empty. Raises OSError, with everything as it was, unless undoing failed, too: `recover` goes on with that.
    """
    note = home / NOTE
    inodes = [os.lstat(source).st_ino for source, _ in moves]
    _write(note, {
        "moves": [[str(source), str(target)] for source, target in moves], "inodes": inodes,
        "staging": [str(folder) for folder in staging], "kept": [str(folder) for folder in kept],
    })  # fmt: skip
    try:
        for source, target in moves:
            os.rename(source, target)
        _sync(moves)
    except BaseException:
        _undo(moves, inodes)
        note.unlink()
        raise
    note.unlink()
    sync_folder(home)


def recover(home: Path) -> bool:
    """Undo what a process that was killed has left half done; whether there was anything. Whoever calls holds the home.

    Raises OSError, and ValueError for a note that cannot be read.
    """
    note = home / NOTE
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    _undo([(Path(source), Path(target)) for source, target in found["moves"]], found["inodes"])
    for folder in found["staging"]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in found["kept"]:
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(folder)
    note.unlink()
    sync_folder(home)
    return True


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


def _undo(moves: Sequence[Move], inodes: Sequence[int]) -> None:
    for (source, target), inode in reversed([*zip(moves, inodes, strict=True)]):
        if os.path.lexists(target) and os.lstat(target).st_ino == inode and not os.path.lexists(source):
            source.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # somebody may have cleared staging away
            os.rename(target, source)
    _sync(moves)


def _sync(moves: Sequence[Move]) -> None:
    for folder in {path.parent for move in moves for path in move}:
        with contextlib.suppress(FileNotFoundError):  # and so nothing was renamed in it
            sync_folder(folder)


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
