"""Rotation of log files: no line is lost or torn, whoever writes, and no more is kept than was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.rotation import LogFile, shift, trim

# Lines of different lengths, numbered, from one of several processes: as logs.py writes them.
WRITE = """
import sys, time
from pathlib import Path
from orchestrator.logwriter import Writer
from orchestrator.rotation import LogFile
name, path, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
writer = Writer(LogFile(path, 20_000, 1000), lambda lost: b"lost %d\\n" % lost)
print("up", flush=True)
sys.stdin.readline()
for number in range(count):
    writer.put(f"{name} {number} {'x' * (number % 300)}.\\n".encode())
    if number % 50 == 0:
        time.sleep(0.002)
writer.close(20)
"""


def contents(path: Path) -> list[str]:
    """The texts of a log and of those moved aside, oldest first."""
    numbers = sorted((int(found.suffix[1:]) for found in path.parent.glob(f"{path.name}.*")), reverse=True)
    return [Path(f"{path}.{number}").read_text() for number in numbers] + [path.read_text()]


def test_two_processes_under_load_lose_and_tear_no_line(tmp_path: Path) -> None:
    """Two processes write one log that is rotated dozens of times: every line of both is there once, whole and in
    order.
    """
    log, count = tmp_path / "gateway.log", 4000
    argv = [sys.executable, "-c", WRITE]
    writers = [
        subprocess.Popen([*argv, name, log, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "up\n"
    for writer in writers:
        writer.communicate("go\n", timeout=60)
        assert writer.returncode == 0
    texts = contents(log)
    assert len(texts) > 20
    assert all(text.endswith("\n") for text in texts)
    lines = [line.split(" ") for text in texts for line in text.splitlines()]
    assert all(rest == f"{'x' * (int(number) % 300)}." for _, number, rest in lines)
    for name in ("a", "b"):
        numbers = [int(number) for who, number, _ in lines if who == name]
        assert sorted(numbers) == list(range(count))
        # who has just been overtaken by a rotation writes once more into the file before
        assert sum(after < before for before, after in zip(numbers, numbers[1:], strict=False)) < len(texts)


def test_a_log_stays_within_its_bounds(tmp_path: Path) -> None:
    """No file passes the limit, the newest is in NAME, then NAME.1, and what is older than `keep` files is gone."""
    log = tmp_path / "logs" / "a.log"
    file = LogFile(log, 100, 2)
    for number in range(40):
        file.write(b"%09d\n" % number)
    assert sorted(found.name for found in log.parent.iterdir()) == ["a.log", "a.log.1", "a.log.2"]
    assert all(len(text) == 100 for text in contents(log))
    assert "".join(contents(log)).split() == [f"{number:09d}" for number in range(10, 40)]


def test_a_log_that_was_moved_or_removed_is_made_anew(tmp_path: Path) -> None:
    """Whoever else moves or deletes the file, the next line is in a new one of the same name."""
    log = tmp_path / "a.log"
    file = LogFile(log, 1000, 2)
    file.write(b"one\n")
    log.rename(tmp_path / "elsewhere")
    file.write(b"two\n")
    log.unlink()
    file.write(b"three\n")
    assert (log.read_text(), (tmp_path / "elsewhere").read_text()) == ("three\n", "one\n")


def test_standard_error_goes_along(tmp_path: Path) -> None:
    """Where standard error is the log, what is printed there after a rotation is in the new file, a crash's stack for
    one.
    """
    log = tmp_path / "a.log"
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.rotation import LogFile\n"
        "file = LogFile(Path(sys.argv[1]), 10, 1)\n"
        "file.write(b'one line\\n')\n"
        "file.write(b'another\\n')\n"
        "os.write(2, b'by itself\\n')\n"
    )
    with log.open("ab") as stderr:
        subprocess.run([sys.executable, "-c", code, log], stderr=stderr, check=True)
    assert contents(log) == ["one line\n", "another\nby itself\n"]


@given(names=st.sets(st.integers(1, 12)), keep=st.integers(1, 6))
def test_moving_up_keeps_the_newest(names: set[int], keep: int, tmp_path_factory: object) -> None:
    """Whatever numbers there are, those below `keep` move up by one, NAME.1 is free, and all others of a row go."""
    folder = tmp_path_factory.mktemp("logs")  # type: ignore[attr-defined]
    for number in names:
        (folder / f"a.log.{number}").write_text(str(number))
    shift(folder / "a.log", keep)
    left = {int(found.suffix[1:]): int(found.read_text()) for found in folder.iterdir()}
    assert 1 not in left
    assert {to: source for to, source in left.items() if to <= keep} == {
        number + 1: number for number in names if number < keep
    }
    assert all(to == source for to, source in left.items() if to > keep)


def test_a_log_of_another_program_is_emptied(tmp_path: Path) -> None:
    """What a program has appended to a file that is too large is in NAME.1, and it goes on at the file's beginning."""
    log = tmp_path / "triton.log"
    with log.open("ab", buffering=0) as program:
        program.write(b"x" * 100)
        assert not trim(log, 100, 2)
        program.write(b"y")
        assert trim(log, 100, 2)
        program.write(b"after")
    assert contents(log) == ["x" * 100 + "y", "after"]
    assert not trim(tmp_path / "missing", 100, 2)
    assert os.stat(log).st_size == 5
