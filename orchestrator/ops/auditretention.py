"""Retention of the audit log: whole files go, oldest first, and the chain can be checked all the same.

Before a file is removed, number and hash of its last line are written into `base`, under the key: `truthgpt audit
verify` begins behind that line. Who has no key can forge none, and so cannot pass off a removal of his own as one of
these. A file whose lines do not verify is evidence and stays, as does everything after it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator.audit import fingerprint_of
from orchestrator.auditlog import (
    BASE,
    CURRENT,
    LINE_BYTES,
    AuditLogError,
    Mark,
    end_of_lines,
    folder_of,
    last_line,
    mark_text,
    parse,
    read_base,
    rotated,
    stamp,
)
from orchestrator.fingerprint import Fingerprint
from orchestrator.ops.auditcheck import Broken, follow
from orchestrator.ops.auditing import note
from orchestrator.ops.cleanwork import Work
from orchestrator.settings import Settings

DAY_S = 86_400.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


def retain(settings: Settings, work: Work) -> None:
    """Remove the files whose last line is older than audit_days; never the one that is being written.

    Raises OSError, AuditKeyError, and AuditLogError where a file that is to go does not verify.
    """
    folder = folder_of(settings.home)
    if not settings.audit_days or not folder.is_dir():
        return
    prints = fingerprint_of(settings, create=False)
    before = stamp(work.now - settings.audit_days * DAY_S)
    with _alone(folder):
        base = read_base(folder, prints)
        if base is None and not (folder / BASE).exists():
            _check_beginning(folder)
        if base is None and not work.dry:
            if (folder / BASE).exists():
                message = f"{folder / BASE} was changed, or written with another key"
                raise AuditLogError(message, "`truthgpt audit verify` says more; nothing is removed until it is mended")
            with contextlib.suppress(OSError):  # once it is there it can be overwritten on a full disk
                _write_base(folder, Mark(), prints)
        reached = first = base or Mark()
        try:
            for path in _finished(folder):
                at, last = _end(path)
                if at >= before:
                    break
                if last is None or last.seq > reached.seq:
                    reached = _remove(path, folder, reached, prints, work)
                else:  # a removal that had got as far as `base`
                    work.remove(str(path), path.stat().st_size, f"events until {at}", path.unlink)
        finally:
            if reached.seq > first.seq and not work.dry:
                what = f"lines {first.seq + 1} to {reached.seq}, older than {settings.audit_days} days"
                problem = note(settings, "audit retention", detail=what)
                if problem:
                    work.note(f"the removal is not in the audit log: {problem}")


def _check_beginning(folder: Path) -> None:
    """A log without `base` begins with line 1, as verify says; a `base` that was removed is not made anew in silence.

    Raises AuditLogError.
    """
    for path in (*rotated(folder), folder / CURRENT):
        try:
            with path.open("rb") as file:
                first = parse(file.readline(LINE_BYTES + 1))
        except FileNotFoundError:
            continue
        if first is not None and first.seq != 1:
            message = f"{path}:1: the chain begins with line {first.seq} instead of 1, and {folder / BASE} is missing"
            raise AuditLogError(message, "nothing is removed until it is put back; `truthgpt audit verify` says more")
        return


def _remove(path: Path, folder: Path, reached: Mark, prints: Fingerprint, work: Work) -> Mark:
    """Remove one file that goes on behind `reached`; its last line."""
    try:
        last = follow(path, prints, reached)
    except Broken as broken:
        message = f"{broken.place}: {broken.why}"
        raise AuditLogError(message, "nothing from there on is removed; `truthgpt audit verify` says more") from broken

    def deed() -> None:
        _write_base(folder, last, prints)
        path.unlink()

    gone = work.remove(str(path), path.stat().st_size, f"events until line {last.seq}", deed)
    if not gone and not work.dry:
        raise AuditLogError(f"{path} could not be removed", "files after it stay, too")
    return last


def _finished(folder: Path) -> Iterator[Path]:
    """The files that may go, oldest first. The newest stays while the current one has no line: it is the end."""
    files = rotated(folder)
    try:
        with (folder / CURRENT).open("rb") as file:
            empty = not end_of_lines(file.fileno())
    except FileNotFoundError:
        empty = True
    return iter(files[:-1] if empty else files)


def _end(path: Path) -> tuple[str, Mark | None]:
    """Time and mark of a file's last line; a time before all others where it makes no sense, so that it is checked."""
    with path.open("rb") as file:
        text = last_line(file.fileno(), end_of_lines(file.fileno()))
    found = parse(text)
    try:
        at = str(json.loads(text)["time"])
    except (ValueError, KeyError, TypeError):
        return "", None
    return at, None if found is None else Mark(found.seq, found.hash)


def _write_base(folder: Path, mark: Mark, prints: Fingerprint) -> None:
    """Replace `base` in one step; on a full disk overwrite it, in one write of as many bytes. Raises OSError."""
    text = mark_text(mark, prints, BASE).encode()
    try:
        _replace(folder, text)
    except OSError as error:
        if error.errno not in _FULL or not (folder / BASE).exists():
            raise
        fd = os.open(folder / BASE, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.pwrite(fd, text, 0)
            os.fsync(fd)
        finally:
            os.close(fd)


def _replace(folder: Path, text: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=folder, prefix=f"{BASE}-")  # created 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, folder / BASE)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else removes files of this log meanwhile. Raises AuditLogError where somebody does."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise AuditLogError(f"another command is removing files of {folder}", "wait until it has ended") from error
    finally:
        os.close(fd)
