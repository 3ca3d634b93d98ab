"""Files in a folder that is somebody's: what a command makes there as root is that one's, who could not use it else.

Blocking. Only what is newly made is given away: a file that is there, or a link, may be anybody's.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def open_owned(path: Path, flags: int) -> int:
    """Open, or make with mode 0600, a file that belongs to whom its folder does; its descriptor. Raises OSError.

    `flags` as os.open has them, without O_CREAT. It is not inherited.
    """
    while True:
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            try:
                return os.open(path, flags | os.O_CLOEXEC)
            except FileNotFoundError:
                if path.is_symlink():  # one that leads nowhere
                    raise
                continue  # removed meanwhile
        try:
            give(fd, path.parent)
        except OSError:
            os.close(fd)
            raise
        return fd


def make_folder(path: Path) -> None:
    """Make a folder with mode 0700 that belongs to whom the one around it does; its parents, too. Raises OSError."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        give(fd, path.parent)
    finally:
        os.close(fd)


def give(fd: int, folder: Path) -> None:
    """As root: make what was newly made the property of a folder's owner. Raises OSError.

    A root that may not do that, in a container or on a network disk, keeps it.
    """
    if os.geteuid() != 0:
        return
    owner = os.stat(folder)
    if owner.st_uid != 0:
        with contextlib.suppress(PermissionError):
            os.fchown(fd, owner.st_uid, owner.st_gid)
