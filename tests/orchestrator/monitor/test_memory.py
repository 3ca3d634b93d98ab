"""Memory of the container or the machine, on trees of files as kernels show them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from orchestrator.monitor.memory import Memory, memory

GIB = 1 << 30
UNLIMITED_V1 = 9223372036854771712


def machine(root: Path, cgroup: str = "", mountinfo: str = "") -> Path:
    """One of 16 GiB, of which 10 are available."""
    files = {
        "proc/meminfo": f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {10 << 20} kB\n",
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mountinfo,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: Path, limit: object, usage: int, inactive: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    # of version 1 the plain field is the group's own, without the groups below it
    (folder / "memory.stat").write_text(
        f"anon 5\ninactive_file {inactive if version == 2 else 1}\ntotal_inactive_file {inactive}\n"
    )


V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    """What is not available counts as used, whether there are cgroups without limits or none."""
    assert memory(machine(tmp_path)) == Memory(6 * GIB, 16 * GIB)
    machine(tmp_path, "0::/service\n", V2_MOUNT)
    group(tmp_path / "sys/fs/cgroup/service", "max", GIB, 0)
    assert memory(tmp_path) == Memory(6 * GIB, 16 * GIB)
    (tmp_path / "proc/self/cgroup").unlink()
    assert memory(tmp_path) == Memory(6 * GIB, 16 * GIB)


def test_the_tightest_limit_around_the_process_counts(tmp_path: Path) -> None:
    """Of nested groups it is the one with the smallest limit, and file pages that can be had back are not in use."""
    machine(tmp_path, "0::/slice/service\n", V2_MOUNT)
    group(tmp_path / "sys/fs/cgroup/slice/service", 4 * GIB, 2 * GIB, GIB // 2)
    group(tmp_path / "sys/fs/cgroup/slice", 8 * GIB, 3 * GIB, 0)
    assert memory(tmp_path) == Memory(2 * GIB - GIB // 2, 4 * GIB)
    group(tmp_path / "sys/fs/cgroup/slice", 3 * GIB, 3 * GIB, GIB)
    assert memory(tmp_path) == Memory(2 * GIB, 3 * GIB)


def test_version_1(tmp_path: Path) -> None:
    """The memory controller's own hierarchy counts, with all groups below; its huge number is no limit."""
    cgroup = "4:memory:/docker/abc\n3:cpu:/\n0::/\n"
    machine(tmp_path, cgroup, V2_MOUNT.replace("cgroup rw", "cgroup/unified rw") + V1_MOUNT.format(root="/"))
    group(tmp_path / "sys/fs/cgroup/memory/docker/abc", 2 * GIB, GIB, GIB // 4, version=1)
    group(tmp_path / "sys/fs/cgroup/memory", UNLIMITED_V1, 9 * GIB, 0, version=1)
    assert memory(tmp_path) == Memory(GIB - GIB // 4, 2 * GIB)


@pytest.mark.parametrize("path", ["/docker/abc", "/", "/../elsewhere"])
def test_inside_a_container_only_its_own_part_is_seen(tmp_path: Path, path: str) -> None:
    """A container that sees its group as the mount's root finds the limit there, whatever its path is called."""
    machine(tmp_path, f"4:memory:{path}\n", V1_MOUNT.format(root="/docker/abc" if "docker" in path else "/"))
    group(tmp_path / "sys/fs/cgroup/memory", 2 * GIB, GIB, 0, version=1)
    group(tmp_path / "sys/fs/cgroup/elsewhere", GIB, 5, 0, version=1)
    assert memory(tmp_path) == Memory(GIB, 2 * GIB)


def test_a_limit_above_the_machine_is_none(tmp_path: Path) -> None:
    """More than there is cannot be used: the machine's own memory is what runs out."""
    machine(tmp_path, "0::/\n", V2_MOUNT)
    group(tmp_path / "sys/fs/cgroup", 64 * GIB, 2 * GIB, 0)
    assert memory(tmp_path) == Memory(6 * GIB, 16 * GIB)


def test_the_real_machine() -> None:
    """On this machine the total is that of psutil, or the smaller one of a limit, and a part of it is in use."""
    found = memory()
    assert 0 < found.used_bytes < found.total_bytes <= psutil.virtual_memory().total


def test_a_machine_that_does_not_say_raises(tmp_path: Path) -> None:
    """Without MemAvailable nothing is made up."""
    machine(tmp_path)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 5 kB\n")
    with pytest.raises(ValueError, match="MemAvailable"):
        memory(tmp_path)
