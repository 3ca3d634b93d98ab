"""The identity of a folder: a random name in it, the same for all replicas that share it, and another on every disk.

A folder that is copied keeps it: who runs a copy beside the original removes the file from the copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import tempfile
from pathlib import Path

FILE = ".truthgpt-id"
_ID = re.compile(r"[0-9a-f]{16}\n?")


def identity(folder: Path) -> str:
    """16 hexadecimal digits. Of a folder that cannot be written the same on this machine only: nothing in it can be
    cleaned up either. Raises OSError where it cannot be read, or is not there.
    """
    found = _read(folder)
    if found is not None:
        return found
    try:
        _create(folder)
    except OSError:
        if not folder.is_dir():
            raise
    return _read(folder) or hashlib.sha256(f"{platform.node()} {folder.resolve()}".encode()).hexdigest()[:16]


def find(folder: Path) -> str | None:
    """The same, and nothing is written: None where the folder has none yet, or is not there.

    None as well where it has one on this machine only. Raises OSError where it cannot be read.
    """
    try:
        return _read(folder)
    except NotADirectoryError:
        return None


def _read(folder: Path) -> str | None:
    try:
        fd = os.open(folder / FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        text = os.pread(fd, 64, 0).decode("ascii", "replace")
    finally:
        os.close(fd)
    return text.strip() if _ID.fullmatch(text) else None


def _create(folder: Path) -> None:
    """Put a name there, complete and in one step, unless somebody else is quicker."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=f"{FILE}-")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            os.fchmod(file.fileno(), 0o644)  # it is no secret, and the replicas may be other users
            file.write(secrets.token_hex(8) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if (folder / FILE).exists() and _read(folder) is None:  # one that was cut off by a crash, or is no name
            os.replace(name, folder / FILE)
            return
        with contextlib.suppress(FileExistsError):
            os.link(name, folder / FILE)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
