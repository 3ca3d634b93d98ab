"""Takes a backup's members out into staging folders, on the disk before anybody relies on them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.local.swap import sync_folder
from orchestrator.ops.backup.tarform import Member

STAGING, BEFORE = "restoring", "before"


@dataclass
class Extract:
    """A sink (reading.py). `roots`: where each tree goes; trees without a root are left out. All folders are new."""

    roots: dict[str, Path]
    _folders: list[tuple[Path, int]] = field(default_factory=list)

    def folder(self, member: Member) -> None:
        path = self._place(member)
        if path is not None:
            path.mkdir(mode=0o700)
            self._folders.append((path, self._mode(member, 0o700)))

    def file(self, member: Member, chunks: Iterator[bytes]) -> None:
        path = self._place(member)
        if path is None:
            return
        # the path is made of folders that were made here, and O_EXCL follows no link
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(handle, view) :]
            os.fchmod(handle, self._mode(member, 0o600))
            os.utime(handle, (member.mtime, member.mtime))
            os.fsync(handle)
        finally:
            os.close(handle)

    def finish(self) -> None:
        """Once everything is out: a folder that nobody may write to can be filled before."""
        for path, mode in reversed(self._folders):
            sync_folder(path)
            path.chmod(mode)

    def _place(self, member: Member) -> Path | None:
        tree, _, rest = member.name.partition("/")
        root = self.roots.get(tree)
        return root if root is None or not rest else root / rest

    @staticmethod
    def _mode(member: Member, least: int) -> int:
        """Models keep theirs; everything else is its owner's alone."""
        return member.mode | least if member.name.startswith("models/") else least


def beside(folder: Path, word: str, stamp: str) -> Path:
    """A name for another folder on the same file system: beside it, else hidden in it. Raises OSError."""
    parent = folder.parent
    movable = folder.stat().st_dev == parent.stat().st_dev and not os.path.ismount(folder)
    if movable and os.access(parent, os.R_OK | os.W_OK | os.X_OK):
        return parent / f"{folder.name}.{word}-{stamp}"
    return folder / f".{word}-{stamp}"


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new folder to fill, locked as long as this process lives; removed on the way out, with what is still in it.

    Those of processes that were killed are removed first. Raises OSError.
    """
    path = beside(folder, STAGING, secrets.token_hex(4))
    _remove_abandoned(path.parent, path.name[:-8])
    path.mkdir(mode=0o700)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        remove(path)
        os.close(handle)


def remove(path: Path) -> None:
    """A folder with all that is in it, folders included that their owner may not write to."""
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for name in os.listdir(parent):
        if not name.startswith(prefix):
            continue
        with contextlib.suppress(OSError):  # it is at work, or gone
            handle = os.open(parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(parent / name)
            finally:
                os.close(handle)
