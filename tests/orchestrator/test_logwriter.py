"""The thread that writes log lines: in order, none lost on a normal end, and never a reason to wait."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from orchestrator.logwriter import COLLECT_S, UNMADE_BYTES, Descriptor, Writer
from tests.clock import awake


def told(lost: int) -> bytes:
    return b"lost %d\n" % lost


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A reader and a writer; both are closed at the end."""
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


class Disk:
    """A file on a disk with `room` bytes left."""

    unit_bytes = 100

    def __init__(self) -> None:
        self.data, self.room = b"", 0

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        part = data[: self.room]
        self.data += part
        self.room -= len(part)
        return len(part)


def read_all(reader: int, until_s: float = 0.5) -> bytes:
    data = b""
    while select.select([reader], [], [], until_s)[0]:
        data += os.read(reader, 1 << 16)
    return data


def test_a_prompt_line_is_written_at_once(pipe: tuple[int, int]) -> None:
    """When `put` returns, a prompt line and all before it have been written; others a moment later, together."""
    reader, end = pipe
    writer = Writer(Descriptor(end), told)
    writer.put(b"one\n")
    writer.put(b"two\n", prompt=True)
    assert os.read(reader, 100) == b"one\ntwo\n"
    writer.put(b"three\n")
    writer.put(b"four\n")
    assert select.select([reader], [], [], COLLECT_S + 5)[0]
    assert os.read(reader, 100) == b"three\nfour\n"
    writer.close()
    writer.put(b"late\n")
    assert os.read(reader, 100) == b"late\n"


def test_a_line_that_the_thread_makes_keeps_its_place(pipe: tuple[int, int]) -> None:
    """It is written between those before and after it, after the end too, and what waits unmade is bounded."""
    reader, end = pipe
    writer = Writer(Descriptor(end), told, queue_bytes=3 * UNMADE_BYTES)
    writer.put(b"one\n")
    writer.put(lambda: b"two\n")
    writer.put(b"three\n", prompt=True)
    assert os.read(reader, 100) == b"one\ntwo\nthree\n"
    for _ in range(5):
        writer.put(lambda: b"more\n")
    writer.close()
    writer.put(lambda: b"late\n")
    assert read_all(reader) == b"more\nmore\nmore\nlost 2\nlate\n"


def test_nobody_waits_for_a_pipe_that_nobody_reads(pipe: tuple[int, int]) -> None:
    """With a full pipe lines are taken at once, lost ones are counted, and told of as soon as somebody reads again."""
    reader, end = pipe
    writer = Writer(Descriptor(end), told, queue_bytes=10_000)
    line = b"x" * 99 + b"\n"
    began = awake()
    for number in range(5000):
        writer.put(line, prompt=number % 10 == 0)
    assert awake() - began < 2.0
    lost = writer.lost
    assert lost > 3000
    data = read_all(reader)
    assert f"lost {lost}\n".encode() in data
    assert data.replace(f"lost {lost}\n".encode(), b"") == line * (5000 - lost)
    assert writer.lost == 0
    writer.close()


def test_a_non_blocking_descriptor_is_waited_for(pipe: tuple[int, int]) -> None:
    """Where somebody has made standard error non-blocking, a full pipe loses nothing of what fits into the queue."""
    reader, end = pipe
    os.set_blocking(end, False)
    writer = Writer(Descriptor(end), told)
    for number in range(20_000):
        writer.put(b"%09d\n" % number)
    assert read_all(reader) == b"".join(b"%09d\n" % number for number in range(20_000))
    writer.close()


def test_a_full_disk_costs_lines_and_tears_none() -> None:
    """What a full disk did not take is counted; the line that it cut is ended, and the loss is told of in a line."""
    disk = Disk()
    writer = Writer(disk, told)
    disk.room = 15
    for _ in range(3):
        writer.put(b"123456789\n", prompt=True)
    assert (writer.lost, disk.data) == (2, b"123456789\n12345")
    disk.room = 1000
    writer.put(b"after\n", prompt=True)
    writer.close()
    assert disk.data == b"123456789\n12345\nafter\nlost 2\n"
    assert writer.lost == 0


def test_close_does_not_wait_for_ever(pipe: tuple[int, int]) -> None:
    """A log that cannot be written keeps no process from ending."""
    reader, end = pipe
    writer = Writer(Descriptor(end), told)
    writer.put(b"x" * 200_000 + b"\n")
    began = awake()
    writer.close(0.1)
    assert awake() - began < 2.0
    assert len(read_all(reader)) == 200_001
    writer.close()  # its thread has ended, else it would write into whatever has the pipe's number next


@pytest.mark.parametrize("ending", ["return", "sys.exit(3)", "raise ValueError('a prompt')", "crash"])
def test_no_line_is_lost_when_a_process_ends(ending: str) -> None:
    """Lines are all there after a normal end, an exit and an exception; before a crash, all up to the last warning,
    and the crash leaves its stacks.
    """
    code = (
        "import ctypes, logging, sys\n"
        "from orchestrator import logs\n"
        "from orchestrator.settings import Settings\n"
        "logs.configure(Settings())\n"
        "log = logging.getLogger('test')\n"
        "def main():\n"
        "    for number in range(1000): log.info('%d', number)\n"
        "    log.warning('the last one')\n"
        f"    {'ctypes.string_at(0)' if ending == 'crash' else ending}\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    lines = done.stderr.splitlines()
    assert [f'"message":"{number}"' in lines[number] for number in range(1000)] == [True] * 1000
    assert '"message":"the last one"' in lines[1000]
    rest = "\n".join(lines[1001:])
    match ending:
        case "return":
            assert (done.returncode, rest) == (0, "")
        case "sys.exit(3)":
            assert (done.returncode, rest) == (3, "")
        case "crash":
            assert done.returncode == -signal.SIGSEGV
            assert "Fatal Python error: Segmentation fault" in rest and "in main" in rest
        case _:
            assert done.returncode == 1
            assert '"level":"critical"' in rest and '"exception":"ValueError"' in rest and "a prompt" not in rest
