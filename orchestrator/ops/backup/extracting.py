"""Takes a backup's members out into staging folders, on the disk before anybody relies on them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.local.swap import sync_folder
from orchestrator.ops.backup.names import lock
from orchestrator.ops.backup.tarform import Member

STAGING, BEFORE = "restoring", "before"
_STAMP = re.compile(r"\d{8}T\d{6}Z")


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


class Beside:
    """Names for other folders that what is in `folder` can be renamed into: beside it, else hidden in it.

    What is mounted cannot be renamed, nor anything out of it, not even where it is another view of the same file
    system: so it is tried. With `inside` nothing is put beside the folder. Raises OSError.
    """

    def __init__(self, folder: Path, inside: bool = False) -> None:
        self._folder, self._inside = folder, inside or not _movable(folder)

    @property
    def parent(self) -> Path:
        return self._folder if self._inside else self._folder.parent

    def prefix(self, word: str) -> str:
        return f".{word}-" if self._inside else f"{self._folder.name}.{word}-"

    def path(self, word: str, stamp: str) -> Path:
        return self.parent / f"{self.prefix(word)}{stamp}"

    def remove_empty(self) -> None:
        """The folders for what was there before that a restore has left that was killed before it moved anything."""
        for name in os.listdir(self.parent):
            if name.startswith(self.prefix(BEFORE)) and _STAMP.fullmatch(name.removeprefix(self.prefix(BEFORE))):
                with contextlib.suppress(OSError):  # it is not empty
                    os.rmdir(self.parent / name)


def _movable(folder: Path) -> bool:
    """Whether what is in a folder can be renamed to places beside it."""
    if folder.parent == folder or not os.access(folder.parent, os.R_OK | os.W_OK | os.X_OK):
        return False
    name = f"{STAGING}-{secrets.token_hex(4)}"  # so that the next restore removes it, should this process be killed
    outside, inside = folder.parent / f"{folder.name}.{name}", folder / f".{name}"
    try:
        outside.mkdir(mode=0o700)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return False
    try:
        os.replace(outside, inside)
        inside.rmdir()
    except OSError as error:
        with contextlib.suppress(OSError):
            outside.rmdir()
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


@contextlib.contextmanager
def staging(beside: Beside) -> Iterator[Path]:
    """A new folder to fill, locked as long as this process lives; removed on the way out, with what is still in it.

    Those of processes that were killed are removed first. Raises OSError.
    """
    path = beside.path(STAGING, secrets.token_hex(4))
    _remove_abandoned(beside.parent, beside.prefix(STAGING))
    path.mkdir(mode=0o700)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock(handle)
        yield path
    finally:
        remove(path)
        os.close(handle)


@contextlib.contextmanager
def made(folder: Path, mode: int = 0o777) -> Iterator[Path]:
    """A folder that may have to be made, and those above it; what of them stays empty goes again. Raises OSError."""
    new = [path for path in (folder.absolute(), *folder.absolute().parents) if not os.path.lexists(path)]
    folder.mkdir(parents=True, exist_ok=True, mode=mode)
    try:
        for path in new:
            sync_folder(path.parent)
        yield folder.resolve()
    finally:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


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
