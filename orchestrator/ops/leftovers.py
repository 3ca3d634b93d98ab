"""What interrupted work has left: an export, a start, a write, a backup, a tuning.

An export (export/repository.py), a backup (ops/backup/names.py) and a tuning (ops/tune/scratch.py) hold an flock on
what they write, for as long as they live, however they end. Others name what they are writing by a temporary name and
rename it: what has such a name and is old is nobody's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from orchestrator.local.process import alive
from orchestrator.models import REMOVED, STAGING
from orchestrator.ops.backup import names
from orchestrator.ops.cleanwork import Work
from orchestrator.ops.folders import Found, entered, listed, opened, remove_tree, walked
from orchestrator.ops.tune import applying, scratch
from orchestrator.settings import MODEL_NAME, Settings

_STAGED = re.compile(rf"{MODEL_NAME}-[0-9]+-[0-9a-f]{{8}}")
_REMOVED = re.compile(re.escape(REMOVED) + _STAGED.pattern)
_LOCK = re.compile(rf"{MODEL_NAME}\.lock")
_BACKENDS = re.compile(r"backends(?:-[0-9]+)?")  # of each Triton server
_BACKEND = re.compile(r"\..+-([0-9]+)")
_RANDOM = r"[a-z0-9_]{8}"  # as tempfile makes names
# of whoever writes a file beside the one that it takes the place of: state, models to serve, keys, identities
_WRITTEN = re.compile(rf"(?:state|models|audit\.key|\.truthgpt-id)-{_RANDOM}")
_IDENTITY = re.compile(rf"\.truthgpt-id-{_RANDOM}")
_AUDIT = re.compile(rf"base-{_RANDOM}")
_CONFIG = re.compile(rf"{re.escape(applying.WRITING)}{_RANDOM}")
_NOTE = re.compile(rf"\.{re.escape(applying.NOTE)}-{_RANDOM}")
_SCRATCH = re.compile(rf"{scratch.PREFIX}{_RANDOM}")


def temporary(settings: Settings, work: Work) -> None:
    """Whatever is older than temporary_age_s and belongs to nobody who lives."""
    oldest = work.now - settings.temporary_age_s
    _staging(settings.model_repository, work, oldest)
    _backends(settings.home, work, oldest)
    _scratches(settings.home, work, oldest)
    for base, folders, pattern in (
        (settings.home, (), _WRITTEN), (settings.home, ("audit",), _AUDIT), (settings.home, (scratch.FOLDER,), _NOTE),
        (settings.model_repository, (), _IDENTITY),
        *((settings.model_repository, (name,), _CONFIG) for name in _models(settings.model_repository, work)),
    ):  # fmt: skip
        with opened(base, *folders) as fd:
            for found in listed(fd, str(base.joinpath(*folders)), work.failed) if fd is not None else ():
                if found.is_file and pattern.fullmatch(found.name) and _touched(found) < oldest:
                    _remove(work, found, "file that was not written to its end")

    def part(path: Path, facts: os.stat_result) -> None:
        why = "backup that was not made to its end"
        work.remove(str(path), facts.st_size, why, path.unlink, work.now - facts.st_mtime)

    names.clear_abandoned(settings.backups, work.now, part)


def _backends(home: Path, work: Work, oldest: float) -> None:
    """What was made anew for each Triton server, and not to its end."""
    with opened(home, "triton") as fd:
        servers = list(listed(fd, str(home / "triton"), work.failed)) if fd is not None else []
        for server in servers:
            if not server.is_folder or not _BACKENDS.fullmatch(server.name):
                continue
            with entered(server) as inside:
                for found in listed(inside, server.path, work.failed) if inside is not None else ():
                    owner = _BACKEND.fullmatch(found.name)
                    if owner is not None and found.is_folder and _touched(found) < oldest and not alive(int(owner[1])):
                        _remove(work, found, "backends of a start that was interrupted")


def _scratches(home: Path, work: Work, oldest: float) -> None:
    with opened(home, scratch.FOLDER) as fd:
        for found in listed(fd, str(home / scratch.FOLDER), work.failed) if fd is not None else ():
            if found.is_folder and _SCRATCH.fullmatch(found.name) and _touched(found) < oldest:
                folder = home.resolve() / scratch.FOLDER / found.name
                _remove_unlocked(work, found, "tuning that was interrupted", partial(scratch.clear_processes, folder))


def _models(repository: Path, work: Work) -> list[str]:
    with opened(repository) as fd:
        rows = listed(fd, str(repository), work.failed) if fd is not None else ()
        return [found.name for found in rows if found.is_folder and re.fullmatch(MODEL_NAME, found.name)]


def _staging(repository: Path, work: Work, oldest: float) -> None:
    with opened(repository) as fd:
        for found in listed(fd, str(repository), work.failed) if fd is not None else ():
            if found.is_folder and _REMOVED.fullmatch(found.name) and _touched(found) < oldest:
                _remove_unlocked(work, found, "removal that was interrupted")
    with opened(repository, STAGING) as fd:
        if fd is None:
            return
        for found in listed(fd, str(repository / STAGING), work.failed):
            folder = found.is_folder and _STAGED.fullmatch(found.name)
            lock = found.is_file and _LOCK.fullmatch(found.name)
            if (folder or lock) and _touched(found) < oldest:
                _remove_unlocked(work, found, "export that was interrupted")
    if not work.dry:
        with opened(repository) as above:
            if above is not None:
                with suppress(OSError):  # not empty while exports are at work, or not there
                    os.rmdir(STAGING, dir_fd=above)


def _remove_unlocked(work: Work, found: Found, what: str, first: Callable[[], object] = lambda: None) -> None:
    """Remove what somebody has left who held a lock on it while he lived; `first` ends what still works on it."""
    try:
        handle = os.open(found.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=found.folder_fd)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            work.failed(found.path, error)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), found.facts):
            if not work.dry:
                first()
            _remove(work, found, what)
    except BlockingIOError:  # its owner lives
        return
    finally:
        os.close(handle)


def _remove(work: Work, found: Found, what: str) -> None:
    size = _size(found) if found.is_folder else found.facts.st_size
    deed = partial(remove_tree, found, work.failed, work.guard) if found.is_folder else found.remove
    work.remove(found.path, size, what, deed, work.now - _touched(found))


def _size(found: Found) -> int:
    """Bytes of all the files in a folder."""
    with entered(found) as fd:
        inside = walked(fd, found.path, lambda path, error: None) if fd is not None else ()
        return sum(inner.facts.st_size for inner in inside if inner.is_file)


def _touched(found: Found) -> float:
    """When it was last touched, also by being renamed, Unix seconds."""
    return max(found.facts.st_mtime, found.facts.st_ctime)
