"""Short, plain names for a home's paths, for programs that cannot take every path.

Triton's Python backend starts its stub through an unquoted line of bash, so a space in the backend directory or the
model repository makes a load hang for ever; a Unix socket's path is limited to 108 bytes.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import tempfile
from pathlib import Path


class AliasError(Exception):
    """No plain name could be made; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def folder(home: Path) -> Path:
    """A folder with a short name that only this home's owner can reach. Raises AliasError when it is another's."""
    path = _path(home)
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise AliasError(f"{path} belongs to somebody else", "remove it, or choose another folder by TMPDIR")
    return path


def plain(home: Path, name: str, target: Path) -> Path:
    """`target`, if bash takes its path for one word, else a link to it. Raises AliasError."""
    if shlex.quote(str(target)) == str(target):
        return target
    link = folder(home) / name
    if shlex.quote(str(link)) != str(link):
        raise AliasError(
            f"Triton cannot take the path {str(target)!r}", "set TMPDIR to a folder without such characters"
        )
    fresh = link.with_name(f".{name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
    return link


def clear(home: Path) -> None:
    """Remove the links of a home, and their folder if nothing else is in it."""
    path = _path(home)
    if path.is_symlink() or not path.is_dir():
        return
    for link in path.iterdir():
        if link.is_symlink():
            link.unlink()
    if not any(path.iterdir()):
        path.rmdir()


def _path(home: Path) -> Path:
    return Path(tempfile.gettempdir()) / f"truthgpt-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:16]}"
