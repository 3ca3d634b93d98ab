"""What the machine has left: memory, GPU memory, disk space, and how old the newest backup is.

Each is read in a thread of its own (sampled.py), so that what hangs holds up nobody and leaves the others fresh.
"""

from __future__ import annotations

import calendar
import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.metrics import Labels, Reading
from orchestrator.monitor.gpu import Gpu, Gpus
from orchestrator.monitor.memory import Memory, memory
from orchestrator.monitor.sampled import EVERY_S, STALE_S, Sampled
from orchestrator.settings import Settings

BACKUP_FILE = re.compile(r"truthgpt-(\d{8}T\d{6}Z)-[0-9a-f]{8}\.tar(?:\.age)?")  # as ops/backup/names.py has it
IDENTITY_FILE = ".truthgpt-id"  # of a home, made once: see jobs/identity.py


@dataclass(frozen=True)
class Disk:
    """The file system where a folder is: bytes that the gateway may still write, bytes that there are."""

    folder: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class NewestBackup:
    """When it was made, as Unix time; None while there is none. `since`: how long the home has been there, as well."""

    at: float | None
    since: float | None = None


def disk(folder: str, path: Path, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs) -> Disk:
    """Of the nearest parent that exists. Raises OSError."""
    path = path.absolute()
    for place in (path, *path.parents):
        try:
            found = statvfs(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        return Disk(folder, found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)
    raise FileNotFoundError(f"{path} has no parent")


def newest_backup(folder: Path, home: Path | None = None) -> NewestBackup:
    """By the times in their names: one that was copied is as old as before. Raises OSError for what cannot be read."""
    since = None
    if home is not None:
        with contextlib.suppress(FileNotFoundError):
            since = os.lstat(home / IDENTITY_FILE).st_mtime
    made = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                match = BACKUP_FILE.fullmatch(entry.name)
                if match is not None and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(ValueError):  # a date that does not exist
                        made.append(float(calendar.timegm(time.strptime(match[1], "%Y%m%dT%H%M%SZ"))))
    except FileNotFoundError:
        pass
    return NewestBackup(max(made, default=None), since)


class Machine:
    """`start` and `stop` are to be called once each; the values are None, or lack a part, where nobody can tell."""

    def __init__(
        self, settings: Settings, every_s: float = EVERY_S, stale_s: float = STALE_S,
        statvfs: Callable[[Path], os.statvfs_result] = os.statvfs, gpus: Gpus | None = None, root: Path = Path("/"),
    ) -> None:  # fmt: skip
        def sampled(name: str, read: Callable[[], Any]) -> Sampled[Any]:
            return Sampled(name, read, every_s, stale_s)

        folders = {
            "home": settings.home, "model_repository": settings.model_repository, "backups": settings.backups,
        }  # fmt: skip
        self._wanted = settings.backup
        self._memory: Sampled[Memory] = sampled("the memory", lambda: memory(root))
        self._gpus: Sampled[tuple[Gpu, ...]] = sampled("the GPUs' memory", (gpus or Gpus()).read)
        self._known_gpus: tuple[Gpu, ...] = ()
        self._newest: Sampled[NewestBackup] = sampled(
            "the newest backup", lambda: newest_backup(settings.backups, settings.home)
        )
        self._disks: dict[str, Sampled[Disk]] = {
            folder: sampled(f"the disk of {folder}", partial(disk, folder, path, statvfs))
            for folder, path in folders.items()
        }

    @property
    def memory(self) -> Memory | None:
        return self._memory.value

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Each that there is or was; the bytes of one that does not answer are None."""
        found = self._gpus.value
        if found is None:
            return tuple(Gpu(known.gpu, None, None) for known in self._known_gpus)
        self._known_gpus = found
        return found

    @property
    def disks(self) -> tuple[Disk, ...]:
        """Those that answer, of home, model_repository and backups."""
        return tuple(found for sampled in self._disks.values() if (found := sampled.value) is not None)

    @property
    def newest_backup(self) -> NewestBackup | None:
        return self._newest.value

    def start(self) -> None:
        """Read everything now and every `every_s` seconds, until `stop`; returns at once."""
        for sampled in self._all():
            sampled.start()

    def stop(self) -> None:
        """Waits for nobody."""
        for sampled in self._all():
            sampled.stop()

    def readings(self) -> dict[str, Reading]:
        """The series of these values; what is unknown is absent."""

        def of_memory(size: Callable[[Memory], int]) -> Reading:
            return lambda: {} if (found := self.memory) is None else {(): float(size(found))}

        def of_gpus(size: Callable[[Gpu], int | None]) -> Reading:
            def read() -> Mapping[Labels, float]:
                sizes = {(gpu.gpu,): size(gpu) for gpu in self.gpus}
                return {labels: float(value) for labels, value in sizes.items() if value is not None}

            return read

        def of_disks(size: Callable[[Disk], int]) -> Reading:
            return lambda: {(found.folder,): float(size(found)) for found in self.disks}

        def newest() -> Mapping[Labels, float]:
            found = self.newest_backup
            return {} if found is None or not self._wanted else {(): found.at or 0.0}

        return {
            "truthgpt_system_memory_used_bytes": of_memory(lambda found: found.used_bytes),
            "truthgpt_system_memory_total_bytes": of_memory(lambda found: found.total_bytes),
            "truthgpt_gpu_memory_usage_bytes": of_gpus(lambda gpu: gpu.used_bytes),
            "truthgpt_gpu_memory_total_bytes": of_gpus(lambda gpu: gpu.total_bytes),
            "truthgpt_disk_free_bytes": of_disks(lambda found: found.free_bytes),
            "truthgpt_disk_total_bytes": of_disks(lambda found: found.total_bytes),
            "truthgpt_backup_newest_timestamp_seconds": newest,
        }

    def figures(self) -> dict[str, Any]:
        """The same as JSON: memory, gpus, disks and backup; what is unknown is None.

        Of the newest backup None says that there is none; while that is unknown `newest_at` is left out. `since` is
        when the home began.
        """
        found, newest = self.memory, self.newest_backup
        backup = {"newest_at": newest.at, "since": newest.since} if newest else {}
        return {
            "memory": asdict(found) if found else {"used_bytes": None, "total_bytes": None},
            "gpus": [asdict(gpu) for gpu in self.gpus],
            "disks": [
                asdict(value) if (value := sampled.value) else
                {"folder": folder, "free_bytes": None, "total_bytes": None}
                for folder, sampled in self._disks.items()
            ],
            "backup": {"wanted": self._wanted, **backup},
        }  # fmt: skip

    def _all(self) -> tuple[Sampled[Any], ...]:
        return (self._memory, self._gpus, self._newest, *self._disks.values())
