"""Publishing into Triton's model repository: all or nothing, also under ``kill -9``.

    <root>/<name>/config.pbtxt
    <root>/<name>/<version>/…
    <root>/.staging/<name>.lock                     one export of a name at a time
    <root>/.staging/<name>-<pid>-<random>/          being written; locked by its owner for as long as that lives
    <root>/.removed-<name>-<pid>-<random>/          being removed on a full disk (``truthgpt models remove``)

Staging lies on the repository's file system, so the last step is a rename. A first version publishes the whole model
folder by one rename; a later one renames the version folder (the commit point) and then replaces config.pbtxt if it
differs. Locks are ``flock``: the kernel drops them when their owner dies, however it dies, so a staging folder that can
be locked is a dead export's and is removed by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from export.errors import RepositoryError
from export.resources import size

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class Staging:
    """A model folder that nobody sees yet. ``version`` is the number that it will be published under."""

    name: str
    version: int
    root: Path

    @property
    def model(self) -> Path:
        """The folder to become ``<root>/<name>``."""
        return self.root / self.name

    @property
    def folder(self) -> Path:
        """The folder to become ``<root>/<name>/<version>``."""
        return self.model / str(self.version)


def check_name(name: str) -> str:
    """The name, if it can be a folder, a model name and part of a URL. Raises `RepositoryError` otherwise."""
    if not NAME.fullmatch(name):
        raise RepositoryError(
            f"'{name}' cannot be a model's name.",
            "Give --name: up to 100 letters, digits, dots, dashes and underscores, beginning with a letter or digit.",
        )
    return name


class Repository:
    """A model repository on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hidden = root / ".staging"

    def versions(self, name: str) -> list[int]:
        """Published versions of a model, ascending."""
        folder = self.root / name
        if not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isascii() and entry.name.isdigit())

    @contextmanager
    def staging(self, name: str) -> Iterator[Staging]:
        """A fresh staging folder for the next version of ``name``; removed on the way out, published or not.

        Raises:
            RepositoryError: a bad name, the folder cannot be written, or the name is being exported by somebody else.
        """
        check_name(name)
        with self._only_export_of(name):
            with translated(self.root):
                self._remove_abandoned()
                root = self._hidden / f"{name}-{os.getpid()}-{secrets.token_hex(4)}"
                root.mkdir()
                handle = os.open(root, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                with translated(self.root):
                    staging = Staging(name, max(self.versions(name), default=0) + 1, root)
                    staging.folder.mkdir(parents=True)
                yield staging
            finally:
                shutil.rmtree(root, ignore_errors=True)
                os.close(handle)

    def require_writable(self) -> None:
        """Raise `RepositoryError` early, before anything is downloaded, if the repository cannot be written."""
        nearest = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())
        if not nearest.is_dir():
            raise _in_the_way(nearest)
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise _unwritable(self.root)

    def require_space(self, needed: int) -> None:
        """Raise `RepositoryError` unless ``needed`` bytes are free on the repository's file system."""
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise RepositoryError(
                f"The export needs {size(needed)} in {self.root}, but only {size(free)} are free.",
                "Free some space, or give --repository on another disk.",
            )

    def publish(self, staging: Staging, step: Callable[[str], None] = lambda text: None) -> Path:
        """Make the staged version visible; returns its folder. ``step`` is told what is about to happen.

        Raises:
            RepositoryError: the repository cannot be written.
        """
        with translated(self.root):
            _sync(staging.model)
            target = self.root / staging.name
            version = target / str(staging.version)
            step("renaming")
            if not target.exists():
                staging.model.rename(target)
                _sync_folder(self.root)
                return version
            staging.folder.rename(version)
            _sync_folder(target)
            step("configuring")
            config = staging.model / CONFIG
            if not (target / CONFIG).exists() or (target / CONFIG).read_bytes() != config.read_bytes():
                config.replace(target / CONFIG)
                _sync_folder(target)
            return version

    @contextmanager
    def _only_export_of(self, name: str) -> Iterator[None]:
        path = self._hidden / f"{name}.lock"
        with translated(self.root):
            handle = self._locked(name, path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)
            # Not empty while other exports are at work: theirs to remove then.
            with suppress(OSError):
                self._hidden.rmdir()

    def _locked(self, name: str, path: Path) -> int:
        while True:
            self._hidden.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # the last export has just taken .staging away
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                raise RepositoryError(
                    f"Another export of {name} into {self.root} is running.", "Wait until it ends."
                ) from error
            # Whoever held it before may have unlinked the file that was opened here: only the one on disk counts.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
            os.close(handle)

    def _remove_abandoned(self) -> None:
        owned = re.compile(rf"{NAME.pattern}(-\d+-[0-9a-f]{{8}}|\.lock)")
        removed = re.compile(rf"\.removed-{NAME.pattern}-\d+-[0-9a-f]{{8}}")
        found = [path for path in self._hidden.iterdir() if owned.fullmatch(path.name)]
        found += [path for path in self.root.iterdir() if removed.fullmatch(path.name)]
        for path in sorted(found):
            if path.is_symlink() or path.is_dir() is (path.suffix == ".lock"):
                continue
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # its owner has just ended
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except BlockingIOError:
                continue  # its owner lives
            finally:
                os.close(handle)


@contextmanager
def translated(root: Path) -> Iterator[None]:
    """Turn the file system's refusals into one sentence for people."""
    try:
        yield
    except OSError as error:
        # numpy tells of a short write in words only: "1000 requested and 300 written".
        short = error.errno is None and "requested and" in str(error)
        if short or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RepositoryError(
                f"There is no space left in {root}.", "Free some, or give --repository on another disk."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _unwritable(root) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise _in_the_way(Path(error.filename or root)) from error
        raise RepositoryError(
            f"The model repository {root} cannot be used: {error.strerror or error}.",
            "Check the disk that it is on, or give --repository on another.",
        ) from error


def _unwritable(root: Path) -> RepositoryError:
    return RepositoryError(
        f"The model repository {root} cannot be written.", "Give --repository with a folder that you may write."
    )


def _in_the_way(path: Path) -> RepositoryError:
    return RepositoryError(f"{path} is in the way: it is not a folder.", "Move it, or give --repository.")


def _sync(folder: Path) -> None:
    """Flush every file and folder below, so that what the rename publishes survives a power cut."""
    for path in folder.rglob("*"):
        _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
