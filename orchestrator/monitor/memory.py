"""Memory of the container where it has a limit (cgroup v2 or v1), else of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Memory:
    """Bytes in use that cannot be had back, and bytes that there are."""

    used_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class _Files:
    """What a version of cgroups calls its files, and what of the use is given up before anybody is killed."""

    limit: str
    usage: str
    reclaimable: str


_V2 = _Files("memory.max", "memory.current", "inactive_file")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory(root: Path = Path("/")) -> Memory:
    """How it is now. Raises OSError or ValueError where /proc cannot be read or does not say."""
    whole = _machine(root)
    tightest: tuple[int, Path, _Files] | None = None
    for folder, files in _groups(root):
        limit = _limit(folder / files.limit)
        if limit is not None and limit < (tightest[0] if tightest else whole.total_bytes):
            tightest = limit, folder, files
    if tightest is None:
        return whole
    limit, folder, files = tightest
    usage = int((folder / files.usage).read_text())
    return Memory(max(0, usage - _field(folder / "memory.stat", files.reclaimable)), limit)


def _machine(root: Path) -> Memory:
    fields = root / "proc/meminfo"
    total = _field(fields, "MemTotal:") * 1024
    return Memory(max(0, total - _field(fields, "MemAvailable:") * 1024), total)


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """The groups that hold this process's memory, its own first, then those around it that can be seen."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            files, kind, option = _V1, "cgroup", "memory"
        elif number == "0" and not controllers:
            files, kind, option = _V2, "cgroup2", ""
        else:
            continue
        found = _mount(root, kind, option)
        if found is None:
            continue
        mounted, point = found
        # in a container the path may be one of the host, of which only the part below `mounted` can be seen
        inside = PurePosixPath(path)
        below = inside.relative_to(mounted) if inside.is_relative_to(mounted) else PurePosixPath()
        if ".." in below.parts:  # the process was moved out of what can be seen
            below = PurePosixPath()
        for part in (below, *below.parents):
            yield point / part, files


def _mount(root: Path, kind: str, option: str) -> tuple[PurePosixPath, Path] | None:
    """Of the hierarchy of this kind: which of its folders is mounted, and where (proc_pid_mountinfo(5))."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        where, what = mount.split(), system.split()
        if len(where) > 4 and len(what) > 2 and what[0] == kind and (not option or option in what[2].split(",")):
            return PurePosixPath(where[3]), root / where[4].lstrip("/")
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:  # a kernel without cgroups
        return []


def _limit(path: Path) -> int | None:
    """A group's limit in bytes; None where it has none or does not say: the topmost one has no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    raise ValueError(f"{path} does not say {name.rstrip(':')}")
