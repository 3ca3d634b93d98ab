"""Cleaning up: which targets there are, and the files of a home that only grow old. `work.dry` makes it a plan."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from orchestrator.auditlog import AuditLogError
from orchestrator.fingerprint import AuditKeyError
from orchestrator.local import tritonserver
from orchestrator.models import ModelsError
from orchestrator.ops import auditretention, leftovers, oldversions
from orchestrator.ops.cleanwork import Tally, Work
from orchestrator.ops.folders import Found, listed, opened, walked
from orchestrator.ops.serving import CannotTell
from orchestrator.settings import Settings

DAY_S = 86_400.0
SHM_AGE_S = 60.0  # a region may be there some moments before the process that works on it
_ROTATED = re.compile(r".+\.[1-9][0-9]{0,5}")
_DATED = re.compile(r"(?:.*[^0-9])?([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[^0-9].*)?")
_FAULTS = (OSError, ModelsError, CannotTell, AuditKeyError, AuditLogError)


def clean(settings: Settings, work: Work, names: Iterable[str]) -> list[Tally]:
    """Work on these targets, one after the other; what each came to. Raises what the work's guard raises only."""
    tallies = []
    for name in names:
        tallies.append(work.begin(name))
        try:
            TARGETS[name](settings, work)
        except _FAULTS as error:
            where = error.filename if isinstance(error, OSError) and error.filename else name
            work.failed(os.fsdecode(where) if isinstance(where, (str, bytes)) else name, error)
    return tallies


def logs(settings: Settings, work: Work) -> None:
    """Rotated files in home/logs; never one that is being written."""
    if not settings.log_days:
        return
    folder = settings.home / "logs"
    current = _facts(settings.log_file)
    with opened(settings.home, "logs") as fd:
        for found in listed(fd, str(folder), work.failed) if fd is not None else ():
            if not found.is_file or not _ROTATED.fullmatch(found.name):
                continue
            if current is None or not os.path.samestat(current, found.facts):
                _remove_if_old(work, found, settings.log_days * DAY_S, "rotated log")


def cache(settings: Settings, work: Work) -> None:
    """Files below home/cache, and the folders that are empty then."""
    if not settings.cache_file_age_s:
        return
    emptied: set[tuple[int, int]] = set()  # folders on the way up from what was removed: as many as they are deep
    with opened(settings.home, "cache") as fd:
        for found in walked(fd, str(settings.home / "cache"), work.failed) if fd is not None else ():
            if not found.is_folder:
                if _remove_if_old(work, found, settings.cache_file_age_s, "cached file"):
                    emptied.add(_identity(os.fstat(found.folder_fd)))
            elif _identity(found.facts) in emptied:
                emptied.discard(_identity(found.facts))
                if not work.dry and _remove_if_empty(work, found):
                    emptied.add(_identity(os.fstat(found.folder_fd)))
            elif work.now - found.facts.st_mtime > settings.cache_file_age_s and not work.dry:
                _remove_if_empty(work, found)


def metrics(settings: Settings, work: Work) -> None:
    """Files of the metric history, by the day in their names."""
    if not settings.metrics_days:
        return
    oldest = datetime.fromtimestamp(work.now, UTC).date() - timedelta(days=settings.metrics_days)
    with opened(settings.home, "metrics") as fd:
        for found in listed(fd, str(settings.home / "metrics"), work.failed) if fd is not None else ():
            dated = _DATED.fullmatch(found.name)
            if dated is None or not found.is_file:
                continue
            try:
                day = datetime.strptime(dated[1], "%Y-%m-%d").date()
            except ValueError:
                continue
            if day < oldest:
                why = f"metric history of {day}"
                work.remove(found.path, found.facts.st_size, why, found.remove, work.now - found.facts.st_mtime)


def shared_memory(settings: Settings, work: Work) -> None:
    """Regions of this home's prefix that no process of a model works on."""
    for region in tritonserver.unused(tritonserver.shm_prefix(settings.home)):
        facts = _facts(region)
        if facts is None or not stat.S_ISREG(facts.st_mode):
            continue
        age_s = work.now - max(facts.st_mtime, facts.st_ctime)
        if age_s > SHM_AGE_S:
            work.remove(str(region), facts.st_size, "shared memory that nobody uses", region.unlink, age_s)


# In the order in which they are worked on: what frees much and needs no space for it first.
TARGETS: dict[str, Callable[[Settings, Work], None]] = {
    "logs": logs,
    "cache": cache,
    "temporary": leftovers.temporary,
    "metrics": metrics,
    "models": oldversions.old_versions,
    "shared_memory": shared_memory,
    "audit": auditretention.retain,
}


def _remove_if_old(work: Work, found: Found, age_s: float, what: str) -> bool:
    own = work.now - found.facts.st_mtime
    return own > age_s and work.remove(found.path, found.facts.st_size, what, found.remove, own)


def _remove_if_empty(work: Work, found: Found) -> bool:
    work.guard()
    try:
        found.remove()
    except OSError:  # something is in it, or it is not ours: it takes no space
        return False
    return True


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _facts(path: Path | None) -> os.stat_result | None:
    try:
        return None if path is None else path.lstat()
    except OSError:
        return None
