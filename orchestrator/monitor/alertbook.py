"""The alert book: `alerts.json` in the home, which the gateway and the commands change together, one at a time.

Blocking: for threads and commands. Whoever changes it holds a lock on `alerts.lock`, and replaces the file by a rename.
Both files are the home's owner's, also where a command runs as root.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from orchestrator.monitor.alerts import Document, from_json, to_json
from orchestrator.ownership import make_folder, open_owned

log = logging.getLogger(__name__)

NAME, LOCK = "alerts.json", "alerts.lock"
MAX_BYTES = 2 << 20
LOCK_S = 1.0  # another one needs some milliseconds; one that is suspended would be waited for without end
LOCK_STEP_S = 0.005

_T = TypeVar("_T")


class BookError(Exception):
    """The book cannot be read or changed; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class _Corrupt(ValueError):
    pass


def read(home: Path) -> Document:
    """The alerts of a home; none where there is no book. Raises BookError."""
    try:
        return _read(home)
    except _Corrupt as error:
        raise BookError(
            f"{home / NAME} is no alert book: {error}", "a running gateway moves it aside and begins a new one"
        ) from error
    except OSError as error:
        raise _not(home, "read", error) from error


def change(home: Path, edit: Callable[[Document], _T]) -> _T:
    """Let a command edit the book; what `edit` returns. Raises BookError, and what `edit` raises."""
    if not home.is_dir():
        return edit(Document())
    try:
        return update(home, lambda document: (document, edit(document)))[1]
    except OSError as error:
        raise _not(home, "changed", error) from error


def update(home: Path, edit: Callable[[Document], tuple[Document, _T]], lock_s: float = LOCK_S) -> tuple[Document, _T]:
    """Read, edit and replace the book under its lock; what `edit` returns. Raises OSError.

    A book that cannot be understood is moved aside, and a new one begun.
    """
    make_folder(home)
    with _locked(home / LOCK, lock_s):
        try:
            document = _read(home)
        except _Corrupt as error:
            os.replace(home / NAME, home / f"{NAME}.corrupt")
            log.error("the alert book was not readable (%s): it is now %s.corrupt, and a new one begun", error, NAME)
            document = Document()
        before = _dumped(document)
        document, result = edit(document)
        data = _dumped(document)
        if data != before:
            _write(home, data)
    return document, result


def _read(home: Path) -> Document:
    try:
        with (home / NAME).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return Document()
    if len(data) > MAX_BYTES:
        raise _Corrupt(f"it is larger than {MAX_BYTES} bytes")
    try:
        return from_json(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise _Corrupt(str(error)) from error


def _dumped(document: Document) -> bytes:
    return json.dumps(to_json(document), separators=(",", ":")).encode()


def _write(home: Path, data: bytes) -> None:
    """In one step: whoever reads finds the book before or the book after. Only its owner may read it."""
    new = home / f"{NAME}.new"  # one name, as only one writes at a time: nothing is left but what the next one replaces
    new.unlink(missing_ok=True)
    fd = open_owned(new, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.replace(new, home / NAME)


@contextlib.contextmanager
def _locked(path: Path, lock_s: float) -> Iterator[None]:
    """Raises TimeoutError (an OSError) where somebody else has held the lock for `lock_s` seconds."""
    fd = open_owned(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        deadline = time.monotonic() + lock_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"somebody else has held {path} for {lock_s:g} s") from None
                time.sleep(LOCK_STEP_S)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that is about to be has this descriptor, too: closing would not unlock
        os.close(fd)


def _not(home: Path, what: str, error: OSError) -> BookError:
    why = error.strerror or str(error)
    return BookError(f"{home / NAME} cannot be {what}: {why}", "see whose the folder is and whether its disk is full")
