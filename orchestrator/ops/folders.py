"""Walking a folder to clean it up: in constant memory, and never out of it.

Every step goes from an open folder to a name in it, which is not followed where it is a link (openat(2), O_NOFOLLOW):
a folder that is exchanged for a link meanwhile leads nowhere. What is mounted below is not entered.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 100  # of folders in folders, each of which is kept open
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NOT_OURS = {errno.ELOOP, errno.ENOTDIR}  # there is a link, or no folder any more

OnError = Callable[[str, OSError], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A name in an open folder. `folder_fd` is open only until the next one is asked for."""

    folder_fd: int
    name: str
    path: str
    facts: os.stat_result

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.facts.st_mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.facts.st_mode)

    def remove(self) -> None:
        """Remove it; a folder has to be empty. Raises OSError."""
        if self.is_folder:
            os.rmdir(self.name, dir_fd=self.folder_fd)
        else:
            os.unlink(self.name, dir_fd=self.folder_fd)


@contextmanager
def opened(base: Path, *names: str) -> Iterator[int | None]:
    """The folder `base`/names… as a descriptor; None where it is not there, or a link stands in its place.

    `base` itself may be reached over links. Raises OSError.
    """
    with ExitStack() as stack:
        try:
            fd = os.open(base, _FOLDER & ~os.O_NOFOLLOW)
            stack.callback(os.close, fd)
            for name in names:
                fd = os.open(name, _FOLDER, dir_fd=fd)
                stack.callback(os.close, fd)
        except OSError as error:
            if error.errno not in (errno.ENOENT, *_NOT_OURS):
                raise
            yield None
            return
        yield fd


def listed(fd: int, path: str, failed: OnError) -> Generator[Found, None, None]:
    """What is in an open folder itself. `failed` is told of names whose facts cannot be had."""
    with os.scandir(fd) as names:
        for entry in names:
            try:
                found = Found(fd, entry.name, f"{path}/{entry.name}", entry.stat(follow_symlinks=False))
            except FileNotFoundError:
                continue
            except OSError as error:
                failed(f"{path}/{entry.name}", error)
                continue
            yield found


def walked(fd: int, path: str, failed: OnError) -> Generator[Found, None, None]:
    """Everything below an open folder, a folder after what is in it. `failed` is told of what cannot be read."""
    mount = _mount_of(fd)
    # descriptor, what is in it, itself as a name in the folder above
    rows: list[tuple[int, Generator[Found, None, None], Found | None]] = [(fd, listed(fd, path, failed), None)]
    try:
        while rows:
            found = next(rows[-1][1], None)
            if found is None:
                below, _, itself = rows.pop()
                if itself is not None:
                    os.close(below)
                    yield itself
                continue
            if not found.is_folder:
                yield found
                continue
            try:
                inner = _entered(found, mount, len(rows))
            except OSError as error:
                failed(found.path, error)
                continue
            if inner is not None:
                rows.append((inner, listed(inner, found.path, failed), found))
    finally:
        for below, names, itself in reversed(rows):
            names.close()
            if itself is not None:
                os.close(below)


@contextmanager
def entered(found: Found) -> Iterator[int | None]:
    """A folder that was found, open; None where it is gone, a link by now, or something is mounted on it.

    Raises OSError.
    """
    fd = _entered(found, _mount_of(found.folder_fd), 0)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def remove_tree(found: Found, failed: OnError, guard: Callable[[], None] = lambda: None) -> None:
    """Remove a folder and all that is in it; `failed` is told of what in it could not be.

    Raises OSError where the folder itself could not be, and what `guard`, which is called before each step, raises.
    """
    with entered(found) as fd:
        if fd is None:
            return
        for inner in walked(fd, found.path, failed):
            guard()
            try:
                inner.remove()
            except FileNotFoundError:
                continue
            except OSError as error:
                failed(inner.path, error)
    found.remove()


def _entered(found: Found, mount: str, depth: int) -> int | None:
    if depth > MAX_DEPTH:
        raise OSError(errno.ELOOP, f"more than {MAX_DEPTH} folders in each other")
    try:
        fd = os.open(found.name, _FOLDER, dir_fd=found.folder_fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, *_NOT_OURS):
            return None
        raise
    if _mount_of(fd) == mount:
        return fd
    os.close(fd)
    return None


def _mount_of(fd: int) -> str:
    """Which mount an open file is on; two of one file system differ."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            for line in file:
                if line.startswith("mnt_id:"):
                    return line
    except OSError:  # no /proc
        pass
    return f"device {os.fstat(fd).st_dev}"
