"""What processes cost: CPU time from /proc/<pid>/stat, memory from /proc/<pid>/smaps_rollup. Pinning to cores."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import psutil

TEST_CORE, OTHER_CORE = 0, 1
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@cache
def cores() -> tuple[int, int]:
    """The core of the system under test, and the one of everything else, as they are before this process pins itself.

    Raises RuntimeError with fewer than two.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise RuntimeError("two cores are needed: one for the system under test, one for load, upstream and Redis")
    return allowed[TEST_CORE], allowed[OTHER_CORE]


def tree(pid: int) -> list[int]:
    """A process and its descendants that live now."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def cpu_s(pids: Iterable[int]) -> float:
    """Seconds of CPU, user and system, of all threads of these processes so far (proc(5): utime + stime)."""
    ticks = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            continue  # it has just ended: what it used is missing, which a caller sees as a smaller figure
        fields = text.rpartition(")")[2].split()  # its name, in front, may hold anything
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_A_SECOND


def memory_mb(pids: Iterable[int]) -> dict[str, float]:
    """`pss`, `uss` and `rss` of these processes together, in 10^6 bytes.

    PSS shares a page out among all who map it, those outside of `pids` too; USS is what their end would give back.
    """
    sums = {"Pss": 0, "Private_Clean": 0, "Private_Dirty": 0, "Rss": 0}
    for pid in pids:
        try:
            rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for row in rows:
            name, _, value = row.partition(":")
            if name in sums:
                sums[name] += int(value.split()[0]) * 1024
    uss = sums["Private_Clean"] + sums["Private_Dirty"]
    return {name: round(value / 1e6, 1) for name, value in (("pss", sums["Pss"]), ("uss", uss), ("rss", sums["Rss"]))}


def pin(pid: int, core: int) -> None:
    """Put every thread of a process and its descendants on one core; what they start later inherits it."""
    for one in tree(pid):
        for thread in os.listdir(f"/proc/{one}/task"):
            os.sched_setaffinity(int(thread), {core})


def pinned(pid: int) -> set[int]:
    """The cores that any thread of a process and its descendants may run on."""
    found: set[int] = set()
    for one in tree(pid):
        for thread in os.listdir(f"/proc/{one}/task"):
            found |= os.sched_getaffinity(int(thread))
    return found
