"""What is measured of a process is its own: what its neighbours do does not show in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from .sampling import anonymous

MIB = 1 << 20
MAPS = """import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
mapped[:: mmap.PAGESIZE]  # touch every page
print(flush=True)
for line in sys.stdin:
    kept = bytearray(int(line))
    kept[:: mmap.PAGESIZE] = b"x" * len(kept[:: mmap.PAGESIZE])
    print(flush=True)
"""


def mapping(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", MAPS, path], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "\n"
    return process


def test_a_neighbours_end_is_no_growth(tmp_path: Path) -> None:
    """When the other process that maps a file ends, the unique set size grows by the file and this memory does not;
    what a process allocates is seen to the page.
    """
    file = tmp_path / "library"
    file.write_bytes(b"x" * 8 * MIB)
    with mapping(file) as one, mapping(file) as other:
        unique, before = psutil.Process(one.pid).memory_full_info().uss, anonymous(one.pid)
        other.communicate()
        assert psutil.Process(one.pid).memory_full_info().uss - unique > 7 * MIB
        assert abs(anonymous(one.pid) - before) < MIB // 4
        assert one.stdin is not None and one.stdout is not None
        print(4 * MIB, file=one.stdin, flush=True)
        assert one.stdout.readline() == "\n"
        assert 4 * MIB <= anonymous(one.pid) - before < 4.5 * MIB
        one.communicate()
